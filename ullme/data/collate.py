"""Triples to token ids: one step's texts on one rank, ragged, in cells.

    cell [i, 0]       the positive of query i
    cell [i, 1 + k]   its k-th negative; length 0 and mask False where the row has fewer

Invariant: cell [i, j] decodes to text (i, j). The cells stay an axis of their own from here to the loss, and N is
1 + negatives in every batch of every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from ullme.data.rows import text_hash
from ullme.data.template import TemplateTokenizer
from ullme.data.triples import Triple
from ullme.ragged import Ragged

T = TypeVar("T")


@dataclass
class Batch:
    """B queries with N = 1 + negatives cells each."""

    queries: Ragged
    """[B] tokens to embed."""
    passages: Ragged
    """[B, N] tokens to embed."""
    prompts: Ragged
    """[B] tokens the generation of a passage is conditioned on; of length 0 where nothing is generated."""
    targets: Ragged
    """[B, N] passage tokens to be scored, without special tokens; of length 0 where nothing is generated."""
    query_skip: Tensor
    """int64 [B] leading tokens of each query that are instruction and template."""
    passage_skip: Tensor
    """int64 [B, N] leading tokens of each passage that are template."""
    mask: Tensor
    """bool [B, N] the cell holds a passage."""
    query_hash: Tensor
    """int64 [B] identity of the query's text."""
    passage_hash: Tensor
    """int64 [B, N] identity of the passage's text, 0 where there is none."""
    positive_hash: Tensor
    """int64 [B, P] identities of all positives of the row, 0 after the last."""
    in_batch_negatives: Tensor
    """bool [B] whether other rows' passages are negatives of the query."""

    def __len__(self) -> int:
        """B."""
        return len(self.mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(lambda value: value.pin_memory())

    def _each(self, move: Callable) -> Self:
        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Collator:
    """Makes a ``Batch`` of triples.

    negatives: cells for negatives a query; a triple with more is refused.
    needs_generation: whether prompts and targets are wanted.
    """

    texts: TemplateTokenizer
    negatives: int
    needs_generation: bool = True

    def __call__(self, triples: Sequence[Triple]) -> Batch:
        queries = [triple.query for triple in triples]
        instructions = [triple.instruction for triple in triples]
        shape = (len(triples), 1 + self.negatives)
        cells: list[str | None] = []
        for triple in triples:
            if (missing := self.negatives - len(triple.negatives)) < 0:
                raise ValueError(
                    f"got {len(triple.negatives)} negatives for a query, expected at most {self.negatives}"
                )
            cells += [triple.positive, *triple.negatives, *[None] * missing]

        query_ids, query_skip = self.texts.queries(queries, instructions)
        index = {text: i for i, text in enumerate(dict.fromkeys(cell for cell in cells if cell is not None))}
        distinct = list(index)
        positives = [[text_hash(text) for text in triple.positives] for triple in triples]
        most_positives = max(map(len, positives))

        def spread(values: Sequence[T], empty: T) -> list[T]:
            """One value per distinct text -> one per cell."""
            return [empty if cell is None else values[index[cell]] for cell in cells]

        if self.needs_generation:
            passage_ids, passage_skip, target_ids = self.texts.passages_and_targets(distinct)
            prompt_ids = self.texts.prompts(queries, instructions)
        else:
            passage_ids, passage_skip = self.texts.passages(distinct)
            target_ids, prompt_ids = [[]] * len(distinct), [[]] * len(queries)
        return Batch(
            queries=Ragged.from_lists(query_ids),
            passages=Ragged.from_lists(spread(passage_ids, []), shape),
            prompts=Ragged.from_lists(prompt_ids),
            targets=Ragged.from_lists(spread(target_ids, []), shape),
            query_skip=torch.tensor(query_skip),
            passage_skip=torch.tensor(spread(passage_skip, 0)).reshape(shape),
            mask=torch.tensor([cell is not None for cell in cells]).reshape(shape),
            query_hash=torch.tensor([text_hash(query) for query in queries]),
            passage_hash=torch.tensor(spread([text_hash(text) for text in distinct], 0)).reshape(shape),
            positive_hash=torch.tensor([row + [0] * (most_positives - len(row)) for row in positives]),
            in_batch_negatives=torch.tensor([triple.in_batch_negatives for triple in triples]),
        )

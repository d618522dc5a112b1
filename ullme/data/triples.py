"""From rows to steps: which triples make up the global batch with a given number.

    order(seed, epoch)               a permutation of the rows
    global batch b                   positions [b G, (b + 1) G) of that order, G queries over all ranks
    rank r of W                      the r-th of W equal slices of it
    triple(seed, epoch, row)         one positive of the row and at most n of its negatives

Invariant: a batch is a pure function of (seed, epoch, b). The number of ranks and of workers only says who reads
which part of it, so no row is read twice in an epoch, and a run resumes by a count of batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ullme.data.cache import OnBadRow
from ullme.data.rows import Columns, Row, normalized
from ullme.data.sources import HubStream, IndexedRows, local_files, open_files, open_hub


@dataclass(frozen=True)
class Triple:
    """A query as one step sees it."""

    query: str
    positive: str
    negatives: list[str]
    """At most as many as were asked for; a row that has fewer gives fewer."""
    positives: list[str]
    """All positives of the row: none of them is a negative of the query, wherever in the batch it stands."""
    instruction: str | None = None
    in_batch_negatives: bool = True


@dataclass(frozen=True)
class TripleSet:
    """One data set and how to read it."""

    path: str
    """A JSONL(.gz) or Parquet file, a folder or glob of such files, or a Hub id."""
    columns: Columns = field(default_factory=Columns)
    config: str | None = None
    """Hub: the configuration."""
    split: str = "train"
    """Hub: the split."""
    revision: str | None = None
    """Hub: the branch, tag or commit."""
    streaming: bool = True
    """Hub: read rows as they arrive; false downloads the set once and shuffles all of it."""
    instruction: str | None = None
    """The instruction of its queries; None is the template's, "" is none."""
    in_batch_negatives: bool = True
    """Whether the passages of other rows are negatives of its queries."""
    max_rows: int | None = None
    """Train on the first rows only."""
    on_bad_row: OnBadRow = "error"
    """Stop at a bad row, or leave it out and report how many."""

    def open(self) -> IndexedRows | HubStream:
        files = local_files(self.path)
        if files is not None:
            return open_files(files, self.columns, self.on_bad_row)
        return open_hub(
            self.path,
            self.columns,
            self.on_bad_row,
            config=self.config,
            split=self.split,
            revision=self.revision,
            streaming=self.streaming,
        )


def draw(row: Row, negatives: int, seed: int, epoch: int, index: int) -> tuple[str, list[str]]:
    """A positive of the row and at most ``negatives`` of its negatives, by (seed, epoch, index) alone.

    A negative that is the same text as a positive is left out, and of equal negatives all but one.
    """
    chance = random.Random(f"{seed} {epoch} {index}")
    positive = chance.choice(row.positives)
    distinct = {normalized(text): text for text in row.negatives}
    for text in row.positives:
        distinct.pop(normalized(text), None)
    candidates = list(distinct.values())
    return positive, chance.sample(candidates, negatives) if len(candidates) > negatives else candidates


class TripleBatches(IterableDataset[list[Triple]]):
    """The batches of one rank, as lists of triples; a ``DataLoader`` with ``batch_size=None`` reads it.

    global_batch_size: queries over all ranks; the rows after the last whole global batch are left out.
    epoch: set it before iterating.
    start: the number of the epoch's first global batch.
    """

    def __init__(
        self,
        triples: TripleSet,
        global_batch_size: int,
        negatives: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(
                f"data.batch_size is {global_batch_size}, the number of queries over all ranks: it must be a multiple "
                f"of the {world_size} ranks"
            )
        self.triples = triples
        self.rows = triples.open()
        self.global_batch_size = global_batch_size
        self.negatives = negatives
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.start = start
        if (n := self.n_rows) is not None and n < global_batch_size:
            raise ValueError(f"{triples.path} holds {n} rows, fewer than one batch: set data.batch_size to {n} or less")

    @property
    def n_rows(self) -> int | None:
        """Rows of an epoch, None where a stream does not say."""
        known = self.rows.n_rows if isinstance(self.rows, HubStream) else len(self.rows)
        limit = self.triples.max_rows
        return known if limit is None or known is None else min(known, limit)

    def __len__(self) -> int:
        """Global batches of an epoch from ``start`` on; TypeError where the number of rows is unknown."""
        if self.n_rows is None:
            raise TypeError(f"{self.triples.path} is a stream that does not say how many rows it has")
        return self.n_rows // self.global_batch_size - self.start

    def __iter__(self) -> Iterator[list[Triple]]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if isinstance(self.rows, HubStream):
            return self._from_stream(self.rows, mine, workers)
        return self._from_index(self.rows, range(self.start + mine, self.start + len(self), workers))

    def _from_index(self, rows: IndexedRows, batches: range) -> Iterator[list[Triple]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_rows or 0)
        for batch in batches:
            window = order[batch * self.global_batch_size :][: self.global_batch_size]
            yield [self._triple(rows[int(i)], int(i)) for i in window[self._slice]]

    def _from_stream(self, stream: HubStream, mine: int, workers: int) -> Iterator[list[Triple]]:
        warn = self.rank == mine == 0
        rows = enumerate(stream.shuffled(self.seed, self.epoch, self.triples.max_rows, warn))
        for batch in count():
            window = list(islice(rows, self.global_batch_size))
            if len(window) < self.global_batch_size:
                return
            if batch >= self.start and (batch - self.start) % workers == mine:
                yield [self._triple(row, i) for i, row in window[self._slice]]

    @property
    def _slice(self) -> slice:
        share = self.global_batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def _triple(self, row: Row, index: int) -> Triple:
        positive, negatives = draw(row, self.negatives, self.seed, self.epoch, index)
        return Triple(
            row.query,
            positive,
            negatives,
            row.positives,
            self.triples.instruction,
            self.triples.in_batch_negatives,
        )

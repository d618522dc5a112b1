"""The data of a run: triples to train on, a retrieval collection to validate on.

    rows --TripleBatches--> triples of this rank --Collator, in workers--> Batch

``batch_size`` counts the queries of all ranks together: it is the batch of the objective, and the number of GPUs that
share it does not change a run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import fsspec.asyn
import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from ullme.data.collate import Batch, Collator
from ullme.data.rows import Columns
from ullme.data.sources import HubStream
from ullme.data.triples import TripleBatches, TripleSet

if TYPE_CHECKING:
    from ullme.data.beir import Collection
    from ullme.data.template import TemplateTokenizer

DOCS = "docs"


class TripleLoader:
    """The batches of one rank: every pass over it is the epoch that ``set_epoch`` said last.

    It is no ``DataLoader``, so that Lightning leaves the sharding to ``TripleBatches``.
    """

    def __init__(self, triples: TripleBatches, collator: Collator, num_workers: int = 0) -> None:
        self.triples = triples
        self.collator = collator
        # every worker would read all of a stream
        self.num_workers = min(num_workers, 1) if isinstance(triples.rows, HubStream) else num_workers
        self.sampler: TripleLoader | None = None
        """Whom Lightning tells the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.triples.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch; TypeError where a stream does not say."""
        return len(self.triples)

    def __iter__(self) -> Iterator[Batch]:
        yield from DataLoader(
            self.triples,
            batch_size=None,
            collate_fn=self.collator,
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )


def _start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    fsspec.asyn.reset_lock()  # the loop that reads from the Hub does not survive a fork


def _itself(collection: Any) -> Any:
    return collection


class TriplesDataModule(L.LightningDataModule):
    """Triples to train on and a collection to validate on.

    A row is a query with its positives and negatives. Each epoch shuffles the rows anew by (seed, epoch), takes one
    positive of each and at most ``negatives`` of its negatives; a row that has fewer gives fewer, and the losses leave
    its empty cells out. The rows after the last whole batch of an epoch are left out of it.

    Args:
        train: A JSONL(.gz) or Parquet file, a folder or glob of such files, a Hub id, or "docs" for the docstrings of
            the installed Python packages.
        train_config: Hub: the configuration of the data set.
        train_split: Hub: its split.
        train_revision: Hub: its branch, tag or commit.
        streaming: Hub: read rows as they arrive, shuffled in a buffer; false downloads the set and shuffles all of it.
        query_column: The column with the query.
        positive_column: The column with the positive passages, a text or a list of texts or of objects with title and
            text; or several columns.
        negative_column: The column with the hard negatives, or several; null where there are none.
        instruction: The instruction of these queries; null is the template's, "" is none.
        in_batch_negatives: Whether the passages of other rows count as negatives of a query.
        max_rows: Train on the first rows only.
        on_bad_row: Stop at a row without a query, a positive or a text, or leave it out and report how many.
        batch_size: Queries of one step, over all GPUs.
        negatives: Hard negatives of a query.
        num_workers: Processes per GPU that read and tokenise.
        seed: Of the order of rows and the choice of positives and negatives.
        validation: A folder in BEIR layout, or "docs"; null validates nothing.
        validation_split: The split of its qrels; null takes the only one, else test, else dev (of "docs": validation).
    """

    def __init__(
        self,
        train: str = DOCS,
        train_config: str | None = None,
        train_split: str = "train",
        train_revision: str | None = None,
        streaming: bool = True,
        query_column: str = "query",
        positive_column: str | list[str] = "pos",
        negative_column: str | list[str] | None = "neg",
        instruction: str | None = None,
        in_batch_negatives: bool = True,
        max_rows: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        batch_size: int = 64,
        negatives: int = 8,
        num_workers: int = 1,
        seed: int = 0,
        validation: str | None = None,
        validation_split: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("negatives", negatives, 0),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("max_rows", 1 if max_rows is None else max_rows, 1),
        ):
            if value < least:
                raise ValueError(f"data.{name} is {value}: it must be {least} or more")
        self.triples = TripleSet(
            path=train,
            columns=Columns(query_column, positive_column, negative_column),
            config=train_config,
            split=train_split,
            revision=train_revision,
            streaming=streaming,
            instruction=instruction,
            in_batch_negatives=in_batch_negatives,
            max_rows=max_rows,
            on_bad_row=on_bad_row,
        )
        self.batch_size = batch_size
        self.negatives = negatives
        self.num_workers = num_workers
        self.seed = seed
        self.validation = validation
        self.validation_split = validation_split

    def prepare_data(self) -> None:
        """Once a node, before the ranks part: rows checked and indexed, the built-in corpus made."""
        self.triple_set.open()

    @cached_property
    def triple_set(self) -> TripleSet:
        if self.triples.path != DOCS:
            return self.triples
        from ullme.data.docs import docs_triples

        path = docs_triples(negatives=max(self.negatives, 8))  # more than are drawn, so that epochs differ
        return replace(self.triples, path=str(path), columns=Columns())

    def loader(
        self,
        texts: TemplateTokenizer,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        needs_generation: bool = True,
    ) -> TripleLoader:
        """The training batches of one rank, without a trainer too."""
        triples = TripleBatches(self.triple_set, self.batch_size, self.negatives, self.seed, rank, world_size, epoch)
        return TripleLoader(triples, Collator(texts, self.negatives, needs_generation), self.num_workers)

    def train_dataloader(self) -> TripleLoader:
        trainer: Any = self.trainer
        module = trainer.lightning_module
        loader = self.loader(
            module.model.texts,
            trainer.global_rank,
            trainer.world_size,
            epoch=trainer.fit_loop.epoch_progress.current.processed,
            needs_generation="logps" in module.losses.reads,
        )
        if not trainer.overfit_batches:
            loader.sampler = loader
        rows = loader.triples.rows
        if isinstance(rows, HubStream):
            if loader.triples.n_rows is None and trainer.max_steps < 0:
                raise ValueError(
                    f"data.train is {self.triples.path!r}, a stream that does not say how many rows it has: "
                    "set trainer.max_steps"
                )
        elif rows.skipped:
            rank_zero_warn(rows.skipped)
        return loader

    @cached_property
    def validation_collection(self) -> Collection | None:
        if self.validation is None:
            return None
        if self.validation == DOCS:
            from ullme.data.docs import docs_collection

            return docs_collection(cast(Any, self.validation_split or "validation"))
        from ullme.data.beir import read_beir

        return read_beir(self.validation, self.validation_split)

    def val_dataloader(self) -> DataLoader | list:
        """One step: the whole collection."""
        if self.validation_collection is None:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return DataLoader(cast(Dataset, [self.validation_collection]), batch_size=None, collate_fn=_itself)

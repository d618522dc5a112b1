"""What the data module promises.

- each epoch's batches in the epoch's own order, also after a resume; as many as it says
- the batch is that of all ranks together
- every bad setting is refused by the key that mends it
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_tokenizer

from ullme.data.beir import Collection
from ullme.data.collate import Batch
from ullme.data.datamodule import TriplesDataModule
from ullme.data.rows import Columns, text_hash
from ullme.data.sources import HubStream
from ullme.data.template import Template, TemplateTokenizer
from ullme.data.triples import TripleSet

N_ROWS = 11


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def train(tmp_path: Path) -> str:
    rows = [
        {"query": f"query {i}", "pos": [f"fox {i}"], "neg": [f"hen {i} {j}" for j in range(i)]} for i in range(N_ROWS)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def texts() -> TemplateTokenizer:
    return TemplateTokenizer(tiny_tokenizer(), Template())


class Recorder(L.LightningModule):
    """Takes a step on every batch and keeps the hashes of its queries."""

    def __init__(self, texts: TemplateTokenizer, reads: frozenset[str] = frozenset({"logps"})) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = SimpleNamespace(texts=texts)
        self.losses = SimpleNamespace(reads=reads)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[tuple[int, list[int]]] = []
        self.lengths: list[int] = []
        self.collections: list[Collection] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append((self.current_epoch, batch.query_hash.tolist()))
        self.lengths.append(int(batch.targets.lengths.sum()))
        self.optimizers().step()

    def validation_step(self, collection: Collection, batch_idx: int) -> None:
        self.collections.append(collection)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def stream_from(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set is a stream of the rows of ``train`` that does not say how many they are."""
    from datasets import Dataset

    rows = Dataset.from_list([json.loads(line) for line in Path(train).read_text().splitlines()])
    stream = HubStream(rows.to_iterable_dataset(), Columns(), "a/b")
    monkeypatch.setattr(TripleSet, "open", lambda self: stream)


def trainer(**settings) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", devices=1, **(quiet | settings))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_trains_on_each_epoch_in_its_own_order(
    train: str, texts: TemplateTokenizer, num_workers: int
) -> None:
    data = TriplesDataModule(train, batch_size=3, negatives=2, num_workers=num_workers, seed=5)
    module = Recorder(texts)
    fit = trainer(max_epochs=3)
    fit.fit(module, data)
    assert fit.estimated_stepping_batches == fit.global_step == 9
    expected = [(e, b.query_hash.tolist()) for e in range(3) for b in data.loader(texts, epoch=e)]
    assert module.batches == expected
    assert len({tuple(h for _, hashes in module.batches[e * 3 : e * 3 + 3] for h in hashes) for e in range(3)}) == 3
    assert min(module.lengths) > 0


def test_a_resumed_run_takes_up_the_order_of_its_epoch(train: str, texts: TemplateTokenizer, tmp_path: Path) -> None:
    data = TriplesDataModule(train, batch_size=3, negatives=2, num_workers=0)
    whole, first, rest = Recorder(texts), Recorder(texts), Recorder(texts)
    trainer(max_epochs=3).fit(whole, data)
    saving = ModelCheckpoint(tmp_path, "after", save_on_train_epoch_end=True)
    trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True).fit(first, data)
    trainer(max_epochs=3).fit(rest, data, ckpt_path=str(tmp_path / "after.ckpt"))
    assert first.batches + rest.batches == whole.batches
    assert len(rest.batches) == 3


def test_a_loader_of_its_own_keeps_its_epoch(train: str, texts: TemplateTokenizer) -> None:
    loader = TriplesDataModule(train, batch_size=3, num_workers=0).loader(texts, epoch=2)
    expected = [batch.query_hash.tolist() for batch in loader]
    module = Recorder(texts)
    trainer(max_epochs=1).fit(module, loader)
    assert [hashes for _, hashes in module.batches] == expected
    loader.set_epoch(0)
    assert [batch.query_hash.tolist() for batch in loader] != expected


def test_overfitting_sees_the_same_batches_in_every_epoch(train: str, texts: TemplateTokenizer) -> None:
    module = Recorder(texts)
    trainer(max_epochs=2, overfit_batches=2).fit(module, TriplesDataModule(train, batch_size=3, num_workers=0))
    first, second = ([hashes for e, hashes in module.batches if e == epoch] for epoch in range(2))
    assert first == second
    assert len(first) == 2


def test_generation_is_prepared_only_where_a_loss_reads_it(train: str, texts: TemplateTokenizer) -> None:
    module = Recorder(texts, reads=frozenset({"query_reps"}))
    trainer(max_steps=2).fit(module, TriplesDataModule(train, batch_size=3, num_workers=0))
    assert module.lengths == [0, 0]


def test_batch_size_is_shared_by_the_ranks(train: str, texts: TemplateTokenizer) -> None:
    data = TriplesDataModule(train, batch_size=4, num_workers=0)
    whole = [batch.query_hash.tolist() for batch in data.loader(texts)]
    parts = [[batch.query_hash.tolist() for batch in data.loader(texts, rank, world_size=2)] for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert len(data.loader(texts, 1, 2)) == len(whole) == 2
    with pytest.raises(ValueError, match="multiple of the 3 ranks"):
        data.loader(texts, 0, 3)


def test_settings_reach_the_batches(tmp_path: Path, texts: TemplateTokenizer) -> None:
    path = tmp_path / "named.jsonl"
    path.write_text('{"question": "q", "answer": "a", "wrong": {"title": "T", "text": "w"}}\n')
    data = TriplesDataModule(
        str(path),
        query_column="question",
        positive_column="answer",
        negative_column="wrong",
        instruction="Find",
        in_batch_negatives=False,
        batch_size=1,
        negatives=2,
        num_workers=0,
    )
    (batch,) = data.loader(texts)
    assert texts.tokenizer.decode(batch.queries[0]) == "<bos>Instruct: Find\nQuery: q"
    assert batch.passage_hash.tolist() == [[text_hash("a"), text_hash("T w"), 0]]
    assert batch.in_batch_negatives.tolist() == [False]


def test_left_out_rows_are_reported(train: str, texts: TemplateTokenizer) -> None:
    with Path(train).open("a") as file:
        file.write('{"query": "q", "pos": [""], "neg": []}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 12: positive 0 is empty"):
        trainer(max_steps=1).fit(Recorder(texts), TriplesDataModule(train, batch_size=2, num_workers=0))
    data = TriplesDataModule(train, batch_size=2, num_workers=0, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"1 of 12 rows are bad and were left out; the first: train\.jsonl, line 12"):
        trainer(max_steps=1).fit(Recorder(texts), data)


def test_a_stream_of_unknown_length_needs_max_steps(
    train: str, texts: TemplateTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_from(train, monkeypatch)
    data = TriplesDataModule("a/b", batch_size=3, negatives=2, num_workers=1)
    with pytest.raises(
        ValueError, match=r"'a/b', a stream that does not say how many rows it has: set trainer\.max_steps"
    ):
        trainer(max_epochs=1).fit(Recorder(texts), data)
    module = Recorder(texts)
    trainer(max_steps=7).fit(module, data)
    assert [epoch for epoch, _ in module.batches] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size is 0: it must be 1 or more"),
        ({"negatives": -1}, r"data\.negatives is -1: it must be 0 or more"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
        ({"seed": -1}, r"data\.seed is -1"),
        ({"max_rows": 0}, r"data\.max_rows is 0: it must be 1 or more"),
    ],
)
def test_impossible_settings_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TriplesDataModule("rows.jsonl", **setting)


def test_validation_is_one_step_with_the_whole_collection(train: str, texts: TemplateTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "T", "text": "a fox"}\n{"_id": "d2", "text": "a hen"}\n'
    )
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "which fox?"}\n')
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    module = Recorder(texts)
    data = TriplesDataModule(train, batch_size=3, num_workers=0, validation=str(folder), validation_split="dev")
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, data)
    assert module.collections == [data.validation_collection] * 2
    assert data.validation_collection is not None
    assert data.validation_collection.corpus == {"d1": "T a fox", "d2": "a hen"}
    assert TriplesDataModule(train).val_dataloader() == []

"""Training through Lightning: one command trains, logs, checkpoints and exports; budgets change no weight."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ullme.data.collate import Collator
from ullme.data.triples import Triple
from ullme.losses import Losses
from ullme.models import ULLME
from ullme.models.checkpoint import load_checkpoint
from ullme.trainer import GradCacheTrainer, ULLMEModule
from ullme.trainer.cli import main
from ullme.trainer.module import check_precision

CONFIG = """
model:
  lora_r: 4
  token_budget: 300
  learning_rate: 0.01
  template: {instruction: ""}
  losses:
    contrastive: {temperature: 0.05}
    dpo: {weight: 0.5}
    kl: {weight: 1.0}
data: {batch_size: 4, negatives: 2, num_workers: 0}
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_last: true, save_on_exception: true}
    - class_path: ullme.trainer.callbacks.ExportModel
"""
WORDS = [
    "fox",
    "hen",
    "barn",
    "query",
    "vector",
    "token",
    "decoder",
    "passage",
    "governor",
    "years",
    "thirty",
    "colony",
]
WORDS += ["red", "lazy", "dog", "brown"]


@pytest.fixture
def run(tmp_path, tiny_folder, monkeypatch):
    """Calls ``train.py`` in a fresh folder with a config, rows to train on and a collection to validate on."""
    rows = [
        {
            "query": f"{a} {b}",
            "pos": [f"the {a} and the {b} met"],
            "neg": [f"the {a} and nobody", f"nobody and the {b}"][: 1 + i % 2],
        }
        for i, (a, b) in enumerate(itertools.pairwise(WORDS))
    ][:12]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": row["pos"][0]} for i, row in enumerate(rows)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (beir / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    lines = "".join(f"q{i}\td{i}\t1\n" for i in range(len(rows)))
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Path:
        line = ["train.py", "fit", "--config", "tiny.yaml", f"--model.model_name_or_path={tiny_folder}"]
        line += ["--data.train=train.jsonl", "--trainer.default_root_dir=run", *arguments]
        monkeypatch.setattr(sys, "argv", line)
        main()
        return tmp_path / "run"

    return call


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_logs_validates_checkpoints_and_exports(run):
    folder = run("--data.validation=beir", "--trainer.check_val_every_n_epoch=1")
    rows = metrics(folder)
    steps = [row for row in rows if row["loss"]]
    assert len(steps) == 2 * 3
    for name in ("contrastive", "dpo", "kl", "train/grad_norm", "train/positive_rank", "speed/tokens_per_second"):
        assert all(float(row[name]) == float(row[name]) for row in steps), name
    first = steps[0]
    total = float(first["contrastive"]) + 0.5 * float(first["dpo"]) + float(first["kl"])
    assert float(first["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(first["dpo"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(steps[-1]["loss"]) < float(first["loss"])
    scores = [float(row["val/ndcg@10"]) for row in rows if row.get("val/ndcg@10")]
    assert len(scores) == 2
    assert all(0 < score <= 1 for score in scores)

    checkpoint = folder / "checkpoints" / "last.ckpt"
    size = sum(p.numel() for p in ULLME.from_pretrained(folder / "export").parameters()) * 4
    assert checkpoint.stat().st_size < size, "a checkpoint holds the adapter, not the base"
    texts = ["the fox and the hen met", "nobody"]
    exported = ULLME.from_pretrained(folder / "export").encode(texts)
    np.testing.assert_allclose(load_checkpoint(checkpoint).encode(texts), exported, atol=1e-5)
    assert (folder / "config.yaml").is_file()


def test_the_token_budget_changes_no_weight(run):
    weights = []
    for budget in ("1", "100000"):
        folder = run(f"--model.token_budget={budget}", "--model.max_grad_norm=0.5", "--trainer.max_epochs=1")
        weights.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_is_continued(run):
    folder = run()
    before = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    run(f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", "--trainer.max_epochs=3")
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    after = torch.load(newest, weights_only=True)
    assert (before["global_step"], after["global_step"]) == (6, 9)
    name = next(iter(before["state_dict"]))
    assert not torch.equal(before["state_dict"][name], after["state_dict"][name])


def test_overrides_reach_the_losses(run):
    folder = run("--model.losses.dpo=null", "--model.losses.kl=null", "--model.losses.sft.weight=0.3")
    first = metrics(folder)[0]
    assert "dpo" not in first
    assert "kl" not in first
    assert float(first["loss"]) == pytest.approx(float(first["contrastive"]) + 0.3 * float(first["sft"]), rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_schedules(run, schedule):
    folder = run(f"--model.schedule={schedule}", "--model.warmup_ratio=0.5", "--trainer.max_epochs=2")
    rates = [float(row["speed/learning_rate"]) / 0.01 for row in metrics(folder)]
    rising, rest = [1 / 3, 2 / 3, 1], {"cosine": [0.75, 0.25, 0], "linear": [2 / 3, 1 / 3, 0], "constant": [1, 1, 1]}
    assert rates == pytest.approx(rising + rest[schedule], abs=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(run, monkeypatch):
    step = ULLMEModule.training_step

    def poisoned(self: ULLMEModule, batch: object, batch_idx: int) -> None:
        if self.global_step == 4:
            with torch.no_grad():
                self.model.base.get_output_embeddings().weight[:] = float("nan")
        step(self, batch, batch_idx)

    monkeypatch.setattr(ULLMEModule, "training_step", poisoned)
    with pytest.raises(SystemExit, match=r"step 4: .*(dpo|kl) = nan.*the last good checkpoint is .*\.ckpt"):
        run()
    saved = sorted(Path("run/checkpoints").glob("*.ckpt"))
    assert saved
    state = torch.load(saved[0], weights_only=True)["state_dict"]
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.learning_rat=1", "learning_rat"),
        ("--model.losses.dpo.betta=1", "betta"),
        ("--data.batchsize=4", "batchsize"),
        ("--model.pooling=cls", "cls"),
        ("--model.losses.triplet.weight=1", "triplet"),
    ],
)
def test_a_key_or_value_that_does_not_exist_is_named(run, argument, message, capsys):
    with pytest.raises(SystemExit):
        run(argument)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("--data.batch_size=500", "batch_size"),
        ("--data.query_column=question", "question"),
        ("--model.max_passage_length=5000", "reads at most 1024 tokens"),
        ("--model.model_name_or_path=no-such/model", "no network"),
        ("--model.lora_r=null", "model.lora_r"),
        ("--data.negatives=0", "data.negatives"),
        ("--model.dtype=bfloat16", "model.dtype"),
    ],
)
def test_what_cannot_be_trained_ends_with_one_sentence(run, argument, message):
    without_adapter = ["--model.lora_r=null", "--model.losses.dpo=null"] if "dtype" in argument else []
    with pytest.raises(SystemExit) as end:
        run(argument, *without_adapter)
    sentence = str(end.value)
    assert sentence.startswith("error: ")
    assert message in sentence
    assert "Traceback" not in sentence
    assert "Traceback" in Path("runs/error.log").read_text()


def test_a_config_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "grl_lama3.yaml"])
    with pytest.raises(SystemExit, match=r"no config 'grl_lama3.yaml'.*grl_llama3.yaml"):
        main()


def test_print_config(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("--print_config")
    assert end.value.code == 0
    assert "temperature: 0.05" in capsys.readouterr().out


def test_loss_scaling_is_refused():
    with pytest.raises(ValueError, match="use bf16-mixed"):
        check_precision("16-mixed")
    check_precision("bf16-mixed")


def test_listing_2(tiny_folder):
    model = ULLME(tiny_folder, lora_r=4)
    triples = [Triple(f"{w} what", f"the {w}", ["nobody"], [f"the {w}"], "", True) for w in WORDS[:8]]
    collate = Collator(model.texts, negatives=1)
    loader = [collate(triples[:4]), collate(triples[4:])] * 4
    trainer = GradCacheTrainer(
        con_loss_type="NTXentLoss", gen_loss_type="dpo", use_kl_loss=True, learning_rate=0.01, warmup_ratio=0.0
    )
    result = trainer.fit_epoch(model=model, train_loader=loader)
    assert {"loss", "contrastive", "dpo", "kl"} <= result.keys()
    assert result["dpo"] < np.log(2)
    assert trainer.losses == Losses.from_names("NTXentLoss", "dpo", True)

"""``WrappedULLME``, the cache of scores, and ``evaluate.py``.

- mteb's loop over ``WrappedULLME`` gives what plain ``encode`` and our own metrics give.
- A score is reused only for the same weights, settings, prompts and data; then nothing is embedded again.
- Whatever cannot be evaluated is one clear sentence; what fails while it runs does not stop the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from mteb.types import PromptType
from tiny import SENTENCES

from ullme.data.beir import Collection, read_beir, write_beir
from ullme.data.template import Template
from ullme.eval import CollectionTask, WrappedULLME, eval_mteb_dataset, evaluate_task, load_model, load_tasks
from ullme.eval.cli import main
from ullme.eval.models import as_mteb_model, find_model
from ullme.eval.mteb import search_collection
from ullme.eval.retrieval import evaluate_collection, search
from ullme.models import ULLME

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = {"max_query_length": 64, "max_passage_length": 64}

FARM = Collection(
    "farm",
    corpus={str(i): text for i, text in enumerate(SENTENCES)} | {"empty": ""},
    queries={"a": "what does a decoder read", "b": "who served for thirty years", "c": "which dog is lazy"},
    qrels={"a": {"2": 2, "3": 1}, "b": {"5": 1}, "c": {"4": 1}},
)


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    write_beir(FARM, tmp_path / "farm")
    return tmp_path / "farm"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that a ULLME embeds while the test runs."""
    texts: list[str] = []
    encode = ULLME.encode

    def counting(self: ULLME, batch: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        texts.extend(batch)
        return encode(self, batch, *args, **kwargs)

    monkeypatch.setattr(ULLME, "encode", counting)
    return texts


def save_checkpoint(model: ULLME, path: Path, **arguments: Any) -> Path:
    """A Lightning checkpoint as training writes it."""
    from ullme.trainer import ULLMEModule

    module = ULLMEModule(**arguments)
    module.model = model
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def randomise_adapter(model: ULLME) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def sentence_transformer(folder: str, where: Path) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    SentenceTransformer(modules=[Transformer(folder), Pooling(32, "mean")]).save(str(where))
    return where


# the encoder


def test_mteb_and_plain_retrieval_agree(tiny_folder: str, farm: Path, tmp_path: Path) -> None:
    model = ULLME(tiny_folder, **LENGTHS)
    ours = evaluate_collection(model, read_beir(farm))
    result = evaluate_task(WrappedULLME.from_model(model), load_tasks(str(farm))[0], tmp_path / "out")
    scores = result.scores["test"][0]
    assert scores["ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-5)
    assert scores["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-6)
    assert scores["recall_at_100"] == pytest.approx(ours["recall@100"], abs=1e-5)
    percent = eval_mteb_dataset(model=model, dataset_name=str(farm), langs=["eng"], output=tmp_path / "out")
    assert percent == {"eng": pytest.approx(100 * ours["ndcg@10"], abs=1e-3)}


@pytest.mark.parametrize(
    ("task", "side", "kind", "instruction"),
    [
        ("SciFact", "query", "query", "Given a scientific claim, retrieve documents that support or refute the claim"),
        ("SciFact", "document", "passage", None),
        ("STS12", None, "query", "Retrieve semantically similar text."),
        ("AskUbuntuDupQuestions", "document", "query", "Retrieve duplicate questions from AskUbuntu forum"),
    ],
)
def test_prompts_follow_e5_mistral(
    tiny_folder: str, task: str, side: str | None, kind: str, instruction: str | None
) -> None:
    encoder = WrappedULLME.from_model(ULLME(tiny_folder, **LENGTHS))
    metadata = mteb.get_task(task).metadata
    assert encoder.prompt(metadata, PromptType(side) if side else None) == (kind, instruction)


def test_the_conventions_are_keys(tiny_folder: str, farm: Path) -> None:
    model = ULLME(tiny_folder, **LENGTHS)
    e5, plain = (
        WrappedULLME.from_model(model, instruct_reranked_documents=flag, normalize_for_classification=not flag)
        for flag in (True, False)
    )
    reranking, classes = (mteb.get_task(name).metadata for name in ("AskUbuntuDupQuestions", "Banking77Classification"))
    assert plain.prompt(reranking, PromptType.document) == ("passage", None)
    batches = [{"text": SENTENCES[:2]}, {"text": SENTENCES[2:3]}]
    context = {"task_metadata": classes, "hf_split": "test", "hf_subset": "default", "show_progress_bar": False}
    raw, unit = e5.encode(batches, **context), plain.encode(batches, **context)
    assert raw.dtype == unit.dtype == np.float32
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)
    assert e5.mteb_model_meta.revision != plain.mteb_model_meta.revision


def test_the_revision_changes_with_all_that_changes_an_embedding(backbone_folder: Callable[..., str]) -> None:
    base: dict[str, Any] = {"model_name_or_path": backbone_folder("llama"), "lora_r": 4, **LENGTHS}
    changed: list[dict[str, Any]] = [
        {},
        {"model_name_or_path": backbone_folder("llama", rms_norm_eps=1e-3)},
        {"pooling": "last"},
        {"attention": "causal"},
        {"template": Template(query="{text}")},
        {"template": Template(instruction="Find the answer")},
        {"max_passage_length": 32},
        {"lora_alpha": 8},
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
    ]
    revisions = []
    for change in changed:
        torch.manual_seed(0)
        revisions.append(WrappedULLME.from_model(ULLME(**(base | change))).mteb_model_meta.revision)
    assert len(set(revisions)) == len(changed)
    torch.manual_seed(0)
    model = ULLME(**base)
    assert WrappedULLME.from_model(model).mteb_model_meta.revision == revisions[0]
    randomise_adapter(model)
    assert WrappedULLME.from_model(model).mteb_model_meta.revision not in revisions


# the cache


def test_a_rerun_embeds_nothing(tiny_folder: str, farm: Path, tmp_path: Path, encoded: list[str]) -> None:
    first = eval_mteb_dataset(load_model(tiny_folder), str(farm), output=tmp_path / "out")
    assert encoded
    encoded.clear()
    assert eval_mteb_dataset(load_model(tiny_folder), str(farm), output=tmp_path / "out") == first
    assert not encoded


def test_a_search_after_an_evaluation_reads_only_its_query(
    tiny_folder: str, farm: Path, tmp_path: Path, encoded: list[str]
) -> None:
    model, task = load_model(tiny_folder), CollectionTask(read_beir(farm))
    evaluate_task(model, task, tmp_path / "out")
    encoded.clear()
    (hits,) = search_collection(model, task, ["lazy dog"], k=2).values()
    assert encoded == ["lazy dog"]
    ours = search(model.model, task.collection.corpus, ["lazy dog"], k=2)[0]
    assert [hit.id for hit in hits] == [hit.id for hit in ours]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in ours], abs=1e-6)


def test_other_data_or_another_instruction_is_evaluated_anew(
    tiny_folder: str, farm: Path, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder)
    eval_mteb_dataset(model, str(farm), output=tmp_path / "out")
    encoded.clear()
    monkeypatch.setattr("ullme.eval.encoder.instruction_for", lambda task: "Another instruction")
    eval_mteb_dataset(model, str(farm), output=tmp_path / "out")
    assert encoded
    encoded.clear()
    write_beir(Collection("farm", FARM.corpus, FARM.queries, {"a": {"0": 1}}), farm)
    eval_mteb_dataset(model, str(farm), output=tmp_path / "out")
    assert encoded


def test_two_local_models_never_share_a_score(backbone_folder: Callable[..., str], farm: Path, tmp_path: Path) -> None:
    """mteb calls both "no_model_name/available"; ours differ, though their folders have one name."""
    folders = []
    for i, layers in enumerate((1, 2)):
        folder = sentence_transformer(backbone_folder("llama", num_hidden_layers=layers), tmp_path / str(i) / "model")
        folders.append(load_model(str(folder)))
    assert folders[0].mteb_model_meta.revision != folders[1].mteb_model_meta.revision
    task = load_tasks(str(farm))[0]
    cached = [evaluate_task(model, task, tmp_path / "out").scores["test"][0] for model in folders]
    alone = [evaluate_task(model, task, tmp_path / str(i)).scores["test"][0] for i, model in enumerate(folders)]
    for a, b in zip(cached, alone, strict=True):
        assert a["ndcg_at_10"] == b["ndcg_at_10"]
        assert a["map_at_1000"] == b["map_at_1000"]
    rewrapped = as_mteb_model(mteb.SentenceTransformerEncoderWrapper(folders[0].model))
    assert rewrapped.mteb_model_meta.revision == folders[0].mteb_model_meta.revision


# models by name


def test_a_checkpoint_is_the_model_it_was_saved_from(tiny_folder: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model_name_or_path": tiny_folder, "lora_r": 4, "pooling": "last", **LENGTHS}
    trained = ULLME(**arguments)
    randomise_adapter(trained)
    path = save_checkpoint(trained, tmp_path / "last.ckpt", **arguments, template=Template())
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    expected = trained.encode(SENTENCES)
    for model in (load_model(str(path)), WrappedULLME(str(moved), lora_r=4, model_checkpoint=path)):
        np.testing.assert_array_equal(model.model.encode(SENTENCES), expected)
    with pytest.raises(ValueError, match=r"lora_r is 8 but .*last.ckpt was trained with 4"):
        WrappedULLME(tiny_folder, lora_r=8, model_checkpoint=path)


def test_listing_3_as_printed(tiny_folder: str, farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"lora_name": "ullme-tiny", "lora_r": 16, "lora_alpha": 32}
    arguments = {"model_name_or_path": tiny_folder, "model_backbone_type": "llama", **settings}
    checkpoint = save_checkpoint(ULLME(**arguments), tmp_path / "last.ckpt", **arguments)
    from ullme.models import WrappedULLME

    model = WrappedULLME(
        model_name_or_path=tiny_folder, model_backbone_type="llama", **settings, model_checkpoint=str(checkpoint)
    )
    result = eval_mteb_dataset(model=model, dataset_name="farm", langs=["eng"])
    assert list(result) == ["eng"]
    assert 0 <= result["eng"] <= 100


def test_an_export_and_an_adapter_are_the_model_they_were_saved_from(tiny_folder: str, tmp_path: Path) -> None:
    trained = ULLME(tiny_folder, lora_r=4, pooling="weighted_mean", **LENGTHS)
    randomise_adapter(trained)
    folder = trained.save_pretrained(tmp_path / "run" / "export")
    expected = trained.encode(SENTENCES, kind="query")
    for spec in (folder, folder / "adapter", tmp_path / "run"):
        np.testing.assert_allclose(load_model(str(spec)).model.encode(SENTENCES, kind="query"), expected, atol=1e-5)
    before = ULLME(tiny_folder, pooling="weighted_mean", **LENGTHS).encode(SENTENCES, kind="query")
    np.testing.assert_array_equal(load_model(f"base:{folder}").model.encode(SENTENCES, kind="query"), before)
    wrapped = WrappedULLME(tiny_folder, "llama", lora_r=4, model_checkpoint=folder / "adapter")
    np.testing.assert_allclose(wrapped.model.encode(SENTENCES, kind="query"), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"lora_alpha is 8 but .*adapter was trained with 32"):
        WrappedULLME(tiny_folder, lora_r=4, lora_alpha=8, model_checkpoint=folder / "adapter")


def test_a_hub_id_with_an_adapter(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub's local cache, as a machine without network has it."""
    trained = ULLME(tiny_folder, lora_r=4, **LENGTHS)
    randomise_adapter(trained)
    repository = tmp_path / "hub" / "models--some-org--some-adapter"
    trained.save_pretrained(tmp_path / "export")
    shutil.copytree(tmp_path / "export" / "adapter", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_model("some-org/some-adapter")
    np.testing.assert_allclose(loaded.model.encode(SENTENCES), trained.encode(SENTENCES), atol=1e-5)
    assert loaded.mteb_model_meta.name == "ullme/some-org-some-adapter"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("./nowhere", r"no such model: the path ./nowhere does not exist"),
        ("some-org/no-such-model", r"no such model: 'some-org/no-such-model' is no folder here.*no network"),
        ("bm52", r"no such model: 'bm52'.*near names: bm25"),
        ("{tmp}", r"no model in .*: expected ullme.json, .* found notes.txt"),
        ("{tmp}/notes.txt", r"is a file but no Lightning checkpoint"),
        ("base:{tmp}", r"needs an export of ours: ullme.json and config.json are not both in"),
    ],
)
def test_what_is_no_model_gets_one_sentence(tmp_path: Path, spec: str, sentence: str) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=sentence) as raised:
        find_model(spec.format(tmp=tmp_path))
    assert "\n" not in str(raised.value)


def test_a_nameless_model_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot evaluate a object: expected ULLME, WrappedULLME, SentenceTransformer"):
        as_mteb_model(object())


# the command


def test_the_command_makes_one_table(tiny_folder: str, farm: Path, tmp_path: Path) -> None:
    """As a user runs it, in a process of its own: two models, a task, a search."""
    command = [sys.executable, str(ROOT / "evaluate.py"), "--model", "bm25", tiny_folder, "--tasks", str(farm)]
    done = subprocess.run(
        [*command, "--search", "lazy dog", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    for word in ("nDCG@10", "MRR@10", "Recall@100", "bm25 on farm", "lazy dog", "the quick brown fox"):
        assert word in done.stdout
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["bm25", tiny_folder]
    assert all((row["queries"], row["documents"]) == (3, 7) for row in rows)
    assert rows[0]["scores"]["nDCG@10"] > 0.5
    table = (tmp_path / "out" / "report.md").read_text()
    assert table.splitlines()[0] == "| task | model | nDCG@10 | MRR@10 | Recall@100 | queries | documents |"
    assert len((tmp_path / "out" / "report.csv").read_text().splitlines()) == 3


def test_what_fails_is_reported_and_the_rest_is_finished(
    tiny_folder: str, farm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.ckpt"
    torch.save({"weights": 1}, broken)
    arguments = ["--model", str(broken), "bm25", "--tasks", "BIOSSES", str(farm), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed: " + str(broken) in printed
    assert "failed: bm25 on BIOSSES" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["task"] for row in report["rows"]] == ["farm"]
    assert len(report["failures"]) == 2
    assert "Traceback" in (tmp_path / "out" / "failures.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "bm25", "--tasks", "SciFcat"], "error: no task 'SciFcat'"),
        (["--model", "nothing-here", "--tasks", "SciFact"], "error: no such model: 'nothing-here'"),
        (["--model", "bm25", "--tasks", "SciFact", "--search", "x"], "error: --search needs a local collection"),
        (["--model", "bm25", "--tasks", "STS22", "--langs", "en"], "error: unknown language code 'en'"),
    ],
)
def test_a_misspelt_command_is_refused_before_anything_runs(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in " ".join(capsys.readouterr().out.split())

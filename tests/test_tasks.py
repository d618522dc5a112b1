"""A name becomes a task or one clear sentence, and each task its instruction.

- All 56 tasks of the paper resolve, with the benchmark's own splits and subsets.
- A folder in BEIR layout is a Retrieval task of the folder's name; other content is another revision.
- Instructions are E5-mistral's; a task that mteb does not know leaves the choice to the template.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ullme.data.beir import Collection, write_beir
from ullme.eval.instructions import instruction_for
from ullme.eval.tasks import ENGLISH_V1, CollectionTask, load_tasks

FARM = Collection(
    "farm",
    corpus={"fox": "the quick brown fox", "hen": "a hen in the barn"},
    queries={"1": "which animal lives in the barn", "2": "which one is quick"},
    qrels={"1": {"hen": 1, "fox": 0}, "2": {"fox": 1}},
)


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    write_beir(FARM, tmp_path / "farm")
    return tmp_path / "farm"


def test_the_papers_56_tasks_resolve() -> None:
    tasks = {task.metadata.name: task for task in load_tasks(ENGLISH_V1)}
    assert len(tasks) == 56
    assert {kind: sum(task.metadata.type == kind for task in tasks.values()) for kind in ("Retrieval", "STS")} == {
        "Retrieval": 15,
        "STS": 10,
    }
    assert [*tasks["MSMARCO"].eval_splits] == ["dev"]
    assert all(instruction_for(name) for name in tasks)


def test_a_task_by_name_is_the_benchmarks_own() -> None:
    assert load_tasks("AmazonCounterfactualClassification")[0].hf_subsets == ["en"]
    assert load_tasks("STS17")[0].hf_subsets == ["en-en"]
    assert load_tasks("STS22", ["deu"])[0].hf_subsets == ["de"]


def test_a_folder_is_a_task_whose_revision_is_its_content(farm: Path) -> None:
    (task,) = load_tasks(str(farm))
    assert isinstance(task, CollectionTask)
    assert (task.metadata.name, task.metadata.type, task.metadata.main_score) == ("farm", "Retrieval", "ndcg_at_10")
    assert load_tasks(str(farm))[0].metadata.revision == task.metadata.revision
    write_beir(Collection("farm", FARM.corpus | {"cat": "the cat"}, FARM.queries, FARM.qrels), farm)
    assert load_tasks(str(farm))[0].metadata.revision != task.metadata.revision


def test_a_task_keeps_its_name_when_its_data_are_unloaded(farm: Path) -> None:
    (task,) = load_tasks(str(farm))
    task.load_data()
    task.unload_data()
    assert task.metadata.name == "farm"


@pytest.mark.parametrize(
    ("name", "languages", "sentence"),
    [
        ("Banking78Classification", ["eng"], r"no task 'Banking78Classification'.*near names: Banking77Classification"),
        ("no/such/folder", ["eng"], r"no task 'no/such/folder': it is no folder here"),
        ("STS22", ["en"], r"unknown language code 'en': three letters of ISO 639-3 are expected, such as 'eng'"),
        ("BIOSSES", ["deu"], r"task BIOSSES has no subset in deu; it has: eng"),
        ("STS22", [], r"no language given"),
    ],
)
def test_what_is_no_task_gets_one_sentence(name: str, languages: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        load_tasks(name, languages)
    assert "\n" not in str(raised.value)


def test_a_folder_without_qrels_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a BEIR folder: there is no qrels"):
        load_tasks(str(tmp_path))


def test_instructions_are_those_of_e5_mistral() -> None:
    assert instruction_for("MSMARCO", "query") == (
        "Given a web search query, retrieve relevant passages that answer the query"
    )
    assert instruction_for("STSBenchmark") == "Retrieve semantically similar text."
    assert instruction_for("SummEval") == "Given a news summary, retrieve other semantically similar summaries"
    assert "Stackexchange" in str(instruction_for("CQADupstackTexRetrieval", "query"))
    assert instruction_for("MSMARCO", "document") == ""
    assert instruction_for("a local folder", "query") is None

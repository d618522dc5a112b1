"""From a word on the command line to mteb tasks: a folder in BEIR layout, "docs", a task, or a whole benchmark.

A local collection becomes an mteb Retrieval task whose data set revision is a digest of its content, so that mteb's
loop, metrics, result files and cache serve it exactly as they serve an official task.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.get_tasks import TASK_LIST
from mteb.languages import ISO_TO_LANGUAGE

from ullme.data.beir import Collection, read_beir
from ullme.eval.fingerprint import digest
from ullme.eval.retrieval import judged_queries

DOCS = "docs"
ENGLISH_V1 = "MTEB(eng, v1)"
SPLIT = "test"


class CollectionTask(AbsTaskRetrieval):
    """A ``Collection`` as an mteb Retrieval task; its main score is nDCG@10.

    Queries without a relevant passage are left out. ``collection`` stays in memory, the data sets are made when the
    task runs.
    """

    metadata = TaskMetadata(
        name="Collection",
        description="A collection in BEIR layout.",
        dataset={"path": "local/collection", "revision": "none"},
        type="Retrieval",
        eval_langs=["eng-Latn"],
        eval_splits=[SPLIT],
        main_score="ndcg_at_10",
    )

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.judged = judged_queries(collection)
        if not self.judged:
            raise ValueError(f"{collection.name}: no query has a relevant passage, so nothing can be scored")
        content = [sorted(part.items()) for part in (collection.corpus, self.judged, collection.qrels)]
        self.metadata = self.metadata.model_copy(
            update={
                "name": collection.name,
                "dataset": {"path": f"local/{collection.name}", "revision": digest(content)},
            }
        )
        super().__init__()

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        if self.data_loaded:
            return
        qrels = {query: dict(self.collection.qrels[query]) for query in self.judged}
        data = RetrievalSplitData(
            corpus=text_dataset(self.collection.corpus),
            queries=text_dataset(self.judged),
            relevant_docs=qrels,
            top_ranked=None,
        )
        self.dataset = {"default": {SPLIT: data}}
        self.data_loaded = True

    def unload_data(self) -> None:
        metadata = self.metadata  # mteb puts the class's own metadata back
        super().unload_data()
        self.metadata = metadata


def text_dataset(texts: dict[str, str]) -> Dataset:
    """id -> text as mteb wants it: columns id and text."""
    return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


def load_tasks(name: str, languages: Sequence[str] = ("eng",), split: str | None = None) -> list[AbsTask]:
    """The mteb tasks that ``name`` stands for.

    name: a folder in BEIR layout, "docs" (the built-in corpus; a folder is ./docs), an mteb task or an mteb benchmark.
    languages: ISO 639-3 codes: the subsets of a multilingual task to run; a benchmark and a folder say that themselves.
    split: the qrels file of a folder that has several; "test" or "validation" of docs.
    Raises ValueError, in one sentence, for a name that is none of these.
    """
    if name == DOCS:
        from ullme.data.docs import docs_collection

        return [CollectionTask(docs_collection(cast(Any, split or "test")))]
    if Path(name).is_dir():
        return [CollectionTask(read_beir(name, split))]
    names = [task.metadata.name for task in TASK_LIST]
    if name in names:
        return [_task(name, languages)]
    benchmarks = [alias for benchmark in mteb.get_benchmarks() for alias in (benchmark.name, *benchmark.aliases)]
    if name in benchmarks:
        return list(mteb.get_benchmark(name).tasks)
    near = difflib.get_close_matches(name, [DOCS, *benchmarks, *names], n=3, cutoff=0.5)
    hint = f"; near names: {', '.join(near)}" if near else ""
    raise ValueError(f"no task {name!r}: it is no folder here, nor {DOCS!r}, nor a task or benchmark of mteb{hint}")


def _task(name: str, languages: Sequence[str]) -> AbsTask:
    """One task by name: with the paper's splits and subsets where the English benchmark has it."""
    check_languages(languages)
    if list(languages) == ["eng"]:
        for task in mteb.get_benchmark(ENGLISH_V1).tasks:
            if task.metadata.name == name:
                return task
    try:
        return mteb.get_task(name, languages=list(languages), exclusive_language_filter=True)
    except ValueError:
        offered = ", ".join(mteb.get_task(name).languages)
        raise ValueError(f"task {name} has no subset in {', '.join(languages)}; it has: {offered}") from None


def check_languages(languages: Sequence[str]) -> None:
    """ISO 639-3 codes only: mteb knows no two-letter ones."""
    if not languages:
        raise ValueError("no language given: langs takes ISO 639-3 codes such as 'eng'")
    for code in languages:
        if code not in ISO_TO_LANGUAGE:
            raise ValueError(f"unknown language code {code!r}: three letters of ISO 639-3 are expected, such as 'eng'")

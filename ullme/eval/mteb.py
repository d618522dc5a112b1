"""Scores by mteb, reused only where they belong.

mteb reuses a complete result of the same model and task even after the data set changed, and never looks at the
instruction. Beside its results we keep, for each model, which data set revision and which prompts each task was run
with (``prompts.json``); a score is reused when both still hold, and computed anew otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.models import SearchEncoderWrapper, SearchProtocol
from mteb.results import TaskResult
from mteb.types import PromptType

from ullme.eval.encoder import WrappedULLME
from ullme.eval.models import as_mteb_model
from ullme.eval.retrieval import Hit
from ullme.eval.tasks import SPLIT, CollectionTask, check_languages, load_tasks, text_dataset

DEFAULT_OUTPUT = Path("runs/evaluation")


def eval_mteb_dataset(
    model: Any,
    dataset_name: str,
    langs: Sequence[str] = ("eng",),
    output: str | Path = DEFAULT_OUTPUT,
) -> dict[str, float]:
    """A task's main score in each language, times 100 as MTEB reports it: {"eng": 35.8}.

    model: WrappedULLME, ULLME, SentenceTransformer, or anything mteb evaluates.
    dataset_name: an mteb task, a folder in BEIR layout, or "docs".
    langs: ISO 639-3 codes; a local collection, which names no language, takes exactly one.
    """
    check_languages(langs)
    encoder = as_mteb_model(model)
    scores = {}
    for language in langs:
        tasks = load_tasks(dataset_name, [language])
        if len(tasks) != 1:
            raise ValueError(f"{dataset_name} is a benchmark of {len(tasks)} tasks: name one task, or use evaluate.py")
        if isinstance(tasks[0], CollectionTask) and len(langs) > 1:
            raise ValueError(f"{dataset_name} is a local collection without languages: langs must name exactly one")
        scores[language] = 100 * score(evaluate_task(encoder, tasks[0], output), tasks[0])
    return scores


def evaluate_task(
    model: Any, task: AbsTask, output: str | Path = DEFAULT_OUTPUT, show_progress_bar: bool = True
) -> TaskResult:
    """mteb's result of one task, from ``output``/results where it is there and still holds."""
    cache = ResultCache(Path(output))
    for part in (task, *_subtasks(task)):
        _forget_stale(cache, model, part)
    result = mteb.evaluate(
        model,
        task,
        cache=cache,
        encode_kwargs={"batch_size": 32, "show_progress_bar": show_progress_bar},
        show_progress_bar=False,
        co2_tracker=False,
    )
    return result.task_results[0]


def _subtasks(task: AbsTask) -> Sequence[AbsTask]:
    return getattr(task.metadata, "tasks", ())


def _forget_stale(cache: ResultCache, model: Any, task: AbsTask) -> None:
    """Delete a result of other data or prompts; note those of the result that is about to be computed."""
    name = task.metadata.name
    result = cache.get_task_result_path(name, model.mteb_model_meta)
    path = result.parent / "prompts.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    record = {
        part.metadata.name: {"dataset_revision": part.metadata.revision, "prompts": _prompts(model, part)}
        for part in (task, *_subtasks(task))
    }
    if records.get(name) != record:
        result.unlink(missing_ok=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records | {name: record}, indent=2, ensure_ascii=False) + "\n")


def _prompts(model: Any, task: AbsTask) -> dict[str, list[str | None]]:
    """[kind, instruction] of each side of the task, for a model whose prompts depend on the task."""
    if not isinstance(model, WrappedULLME):
        return {}
    sides = (PromptType.query, PromptType.document, None)
    return {side.value if side else "text": list(model.prompt(task.metadata, side)) for side in sides}


def score(result: TaskResult, task: AbsTask, metric: str = "main_score") -> float:
    """The mean of a metric over the task's own splits and subsets, in [0, 1]."""
    return float(result.validate_and_filter_scores(task).get_score(getter=itemgetter(metric)))


def search_collection(model: Any, task: CollectionTask, queries: Sequence[str], k: int = 5) -> dict[str, list[Hit]]:
    """The k best passages of the task's corpus for each query, by the prompts of the task."""
    searcher = model if isinstance(model, SearchProtocol) else SearchEncoderWrapper(model)
    corpus = task.collection.corpus
    context: dict[str, Any] = {
        "task_metadata": task.metadata,
        "hf_split": SPLIT,
        "hf_subset": "default",
        "encode_kwargs": {"batch_size": 32, "show_progress_bar": True},
        "num_proc": None,
    }
    asked: Dataset = text_dataset({str(i): query for i, query in enumerate(queries)})
    searcher.index(text_dataset(corpus), **context)
    found = searcher.search(asked, top_k=k, **context)
    return {
        query: [Hit(key, value, corpus[key]) for key, value in sorted(hits.items(), key=lambda hit: -hit[1])]
        for query, hits in zip(queries, (found[str(i)] for i in range(len(queries))), strict=True)
    }

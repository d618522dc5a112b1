"""The command line of ``evaluate.py``: every model on every task, a table, a few searches.

What is misspelt is refused before a model is loaded. What fails while it runs is reported at the end and the rest is
finished; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.results import TaskResult

    from ullme.eval.report import Row
    from ullme.eval.retrieval import Hit


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate embedders, in one table.")
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        help="an export (base:EXPORT is the model before training), an adapter folder, a Lightning checkpoint, a "
        "SentenceTransformer or a decoder (folder or Hub id), a name mteb registers, bm25, or docs-lm",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["docs"],
        help="folders in BEIR layout, docs (the built-in corpus), mteb tasks, mteb benchmarks (default: docs)",
    )
    parser.add_argument("--search", nargs="+", default=[], metavar="QUERY", help="also search the local collections")
    parser.add_argument("--top", type=int, default=3, help="passages shown for each search (default: 3)")
    parser.add_argument(
        "--output", default="runs/evaluation", help="folder of results and report (default: %(default)s)"
    )
    parser.add_argument("--langs", nargs="+", default=["eng"], help="ISO 639-3 codes for multilingual tasks")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the run's own, else float32)")
    parser.add_argument("--split", help="qrels/SPLIT.tsv of a BEIR folder (default: the only one, test or dev)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    console = Console()
    warnings.filterwarnings("ignore", module="mteb")
    logging.getLogger("mteb").setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    from ullme.eval.models import find_model
    from ullme.eval.mteb import evaluate_task, search_collection
    from ullme.eval.report import Report, print_hits
    from ullme.eval.tasks import CollectionTask, load_tasks

    try:
        loaders = {name: find_model(name, args.dtype) for name in args.model}
        tasks = [task for name in args.tasks for task in load_tasks(name, args.langs, args.split)]
        if args.search and not any(isinstance(task, CollectionTask) for task in tasks):
            raise ValueError("--search needs a local collection among --tasks: a folder in BEIR layout, or docs")
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2

    report = Report()
    searches: dict[str, dict[str, list[Hit]]] = {query: {} for query in args.search}
    for number, (name, load) in enumerate(loaders.items(), start=1):
        console.print(f"[{number}/{len(loaders)}] {name}", style="bold", markup=False)
        try:
            model = load()
        except Exception as error:
            report.fail(name, error)
            continue
        for task in tasks:
            where = f"{name} on {task.metadata.name}"
            console.print(f"  {task.metadata.name}", markup=False)
            try:
                report.rows.append(_row(name, task, evaluate_task(model, task, args.output)))
                if args.search and isinstance(task, CollectionTask):
                    for query, hits in search_collection(model, task, args.search, args.top).items():
                        searches[query][where] = hits
            except Exception as error:
                report.fail(where, error)
        del model
        gc.collect()

    report.print(console)
    for query, found in searches.items():
        print_hits(console, query, found)
    console.print(f"\nwritten to {report.write(args.output)}", markup=False, highlight=False)
    return 1 if report.failures else 0


def _row(name: str, task: AbsTask, result: TaskResult) -> Row:
    """One row of the table: the three retrieval metrics where the task has them, its main score otherwise."""
    from ullme.eval.mteb import score
    from ullme.eval.report import RETRIEVAL_METRICS, Row
    from ullme.eval.tasks import CollectionTask

    known = next(iter(result.scores.values()))[0].keys()
    metrics = RETRIEVAL_METRICS if known >= set(RETRIEVAL_METRICS.values()) else {"main score": "main_score"}
    row = Row(task.metadata.name, name, {title: score(result, task, metric) for title, metric in metrics.items()})
    if isinstance(task, CollectionTask):
        row.queries, row.documents = len(task.judged), len(task.collection.corpus)
    return row

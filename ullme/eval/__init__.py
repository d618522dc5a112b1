"""How good is it: mteb tasks, local collections, tables. Nothing here is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "WrappedULLME": "encoder",
    "instruction_for": "instructions",
    "load_model": "models",
    "eval_mteb_dataset": "mteb",
    "evaluate_task": "mteb",
    "Report": "report",
    "evaluate_collection": "retrieval",
    "rank": "retrieval",
    "retrieval_metrics": "retrieval",
    "search": "retrieval",
    "CollectionTask": "tasks",
    "load_tasks": "tasks",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

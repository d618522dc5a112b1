"""How a step is made. ``GradCacheTrainer`` is the paper's listing 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fit import GradCacheTrainer
    from .module import ULLMEModule

__all__ = ["GradCacheTrainer", "ULLMEModule"]


def __getattr__(name: str) -> Any:
    if name == "GradCacheTrainer":
        from .fit import GradCacheTrainer

        return GradCacheTrainer
    if name == "ULLMEModule":
        from .module import ULLMEModule

        return ULLMEModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The model and what it knows. ``ULLME`` embeds and generates; ``WrappedULLME`` is its mteb encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullme.eval.encoder import WrappedULLME

    from .ullme import ULLME

__all__ = ["ULLME", "WrappedULLME"]


def __getattr__(name: str) -> Any:
    if name == "ULLME":
        from .ullme import ULLME

        return ULLME
    if name == "WrappedULLME":  # the paper's listing 3 imports it from here; it needs mteb, which only evaluation does
        from ullme.eval.encoder import WrappedULLME

        return WrappedULLME
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a training row is: a query, the passages that answer it, and passages that do not.

    {"query": "...", "pos": ["..."], "neg": ["...", "..."]}      column names are settings

A passage is a string or {"title": ..., "text": ...}; a column holds one passage or a list of them, or several columns
hold one each. Nothing is guessed: a row that lacks a column or a text is refused, in a sentence that names it.

Two texts are the same text when they are equal after runs of white space are made one space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any


class BadRow(ValueError):
    """A row that cannot be trained on; the message says why and leaves the place to the reader of the file."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the texts."""

    query: str = "query"
    positive: str | Sequence[str] = "pos"
    """One column, or several that are joined."""
    negative: str | Sequence[str] | None = "neg"
    """One column, several that are joined (a null one is skipped), or None for rows without hard negatives."""


@dataclass(frozen=True)
class Row:
    """All that a source holds about one query; at least one positive, no empty text."""

    query: str
    positives: list[str]
    negatives: list[str]


def parse_row(record: Any, columns: Columns) -> Row:
    """The row in a decoded JSON object or a row of a table; BadRow where it is not one."""
    if not isinstance(record, Mapping):
        raise BadRow(f"expected an object with the column {columns.query!r}, got {type(record).__name__}")
    query = _text(_column(record, columns.query, "query"), "query")
    positives = _passages(record, columns.positive, "positive")
    if not positives:
        raise BadRow(f"no positive: the column {columns.positive!r} is empty")
    negatives = [] if columns.negative is None else _passages(record, columns.negative, "negative")
    return Row(query, positives, negatives)


def _column(record: Mapping[str, Any], name: str, role: str) -> Any:
    if name not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise BadRow(f"no column {name!r}; found {found}: set data.{role}_column to the one that holds the {role}")
    return record[name]


def _passages(record: Mapping[str, Any], names: str | Sequence[str], role: str) -> list[str]:
    texts: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        value = _column(record, name, role)
        texts += [_text(cell, f"{role} {len(texts) + i}") for i, cell in enumerate(_cells(value))]
    return texts


def _cells(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # a table's list of objects, by column
        return [dict(zip(value, cell, strict=True)) for cell in zip(*value.values(), strict=True)]
    return value if isinstance(value, list | tuple) else [value]


def _text(value: Any, what: str) -> str:
    if isinstance(value, Mapping):
        if not isinstance(value.get("text"), str):
            raise BadRow(f"{what} has no text: a passage is a string or an object with 'text' and perhaps 'title'")
        value = f"{value.get('title') or ''} {value['text']}".strip()
    if not isinstance(value, str):
        raise BadRow(f"{what} is not a text but {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{what} holds half a character (a lone surrogate)") from None
    return value


def normalized(text: str) -> str:
    """The text with every run of white space as one space: the identity of a text."""
    return " ".join(text.split())


def text_hash(text: str) -> int:
    """A signed 64-bit number for the normalised text, the same on every machine, never 0."""
    digest = blake2b(normalized(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1

"""What is made once from a user's files and kept: the plain text of a gzip file, the index of a file's good rows.

A cached file is named by the place, size and time of what it was made from; it is written aside and renamed, so that
another process sees all of it or nothing.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

OnBadRow = Literal["error", "skip"]

_QUOTED = 5  # bad rows that the report quotes


def cache_folder() -> Path:
    """``$ULLME_CACHE``, by default ~/.cache/ullme."""
    return Path(os.environ.get("ULLME_CACHE", "~/.cache/ullme")).expanduser()


@dataclass(frozen=True)
class Checked:
    """The good rows of a file.

    index: int64 [n], memory-mapped; where each good row is.
    n_bad, first_bad: how many rows are bad, and a sentence about each of the first few.
    """

    index: NDArray[np.int64]
    n_bad: int
    first_bad: list[str]


def checked(
    files: list[Path], settings: object, check: Callable[[], Iterator[int | str]], on_bad_row: OnBadRow
) -> Checked:
    """What ``check`` finds in ``files``: a number for a good row, a sentence for a bad one.

    settings: what the result depends on beside the files.
    ValueError at the first bad row unless ``on_bad_row`` is "skip".
    """
    folder = cache_folder() / "rows"
    index_file = folder / f"{_key(files, settings)}.npy"
    report_file = index_file.with_suffix(".json")
    if not (index_file.exists() and report_file.exists()):
        bad = {"count": 0, "first": []}
        index = np.fromiter(_good(check(), bad, on_bad_row), dtype=np.int64)
        _write_whole(report_file, lambda out: out.write(json.dumps(bad).encode()))
        _write_whole(index_file, lambda out: np.save(out, index, allow_pickle=False))
    report = json.loads(report_file.read_text())
    if report["count"] and on_bad_row == "error":
        raise ValueError(_refusal(report["first"][0]))
    return Checked(np.load(index_file, mmap_mode="r", allow_pickle=False), report["count"], report["first"])


def _good(found: Iterator[int | str], bad: dict[str, Any], on_bad_row: OnBadRow) -> Iterator[int]:
    for row in found:
        if isinstance(row, int):
            yield row
        elif on_bad_row == "error":
            raise ValueError(_refusal(row))
        else:
            bad["count"] += 1
            bad["first"] = [*bad["first"], row][:_QUOTED]


def _refusal(sentence: str) -> str:
    return f"{sentence} (to leave such rows out, set data.on_bad_row to skip)"


def unpacked(path: Path) -> Path:
    """The plain text of a gzip file, in the cache; any other file as it is. ValueError where the file is cut short."""
    if path.suffix != ".gz":
        return path
    target = cache_folder() / "rows" / f"{_key([path])}.jsonl"

    def unpack(out: BinaryIO) -> None:
        try:
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, out, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path.name} is not a whole gzip file: {error}") from error

    if not target.exists():
        _write_whole(target, unpack)
    return target


def _key(files: list[Path], *settings: object) -> str:
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return blake2b(repr((stats, settings)).encode(), digest_size=12).hexdigest()


def _write_whole(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as out:
            write(out)
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise

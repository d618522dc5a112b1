"""Where training rows lie: JSON lines or Parquet on this machine, or a data set on the Hub.

    JsonLines   *.jsonl, *.jsonl.gz     rows by their offsets in the file
    Table       *.parquet, Hub id       rows by their numbers, memory-mapped by ``datasets``; a Hub id is downloaded
    HubStream   Hub id                  rows as they arrive, nothing downloaded, shuffled in a bounded buffer

The first two give any row by its index, so that an order is a permutation of numbers; each of their rows is checked
once, before training starts. No source is ever whole in memory.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from functools import partial
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from ullme.data.cache import Checked, OnBadRow, cache_folder, checked, unpacked
from ullme.data.rows import BadRow, Columns, Row, parse_row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class IndexedRows(Protocol):
    """Rows by index."""

    @property
    def skipped(self) -> str | None:
        """A sentence about the bad rows that were left out."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class JsonLines:
    """Rows of JSON-lines files, one file after another."""

    def __init__(self, files: list[Path], columns: Columns, on_bad_row: OnBadRow = "error") -> None:
        self.columns = columns
        self.texts = [unpacked(path) for path in files]
        self.files: list[Checked] = []
        for path, text in zip(files, self.texts, strict=True):
            self.files.append(checked([path], columns, partial(self._check, text, path.name), on_bad_row))
        self.ends = np.cumsum([len(file.index) for file in self.files])
        _refuse_empty(self.files, files[0].name)

    def _check(self, text: Path, name: str) -> Iterator[int | str]:
        size = text.stat().st_size
        with (
            text.open("rb") as lines,
            tqdm(desc=f"checking {name}", total=size, unit="B", unit_scale=True, delay=3) as bar,
        ):
            offset = 0
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        self._parse(line)
                        yield offset
                    except BadRow as fault:
                        yield f"{name}, line {number}: {fault}"
                offset += len(line)
                bar.update(len(line))

    def _parse(self, line: bytes) -> Row:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRow(f"broken JSON, {error.msg} at column {error.colno}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise BadRow(f"broken JSON, {error}") from None
        return parse_row(record, self.columns)

    @property
    def skipped(self) -> str | None:
        return _skipped(self.files)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Row:
        file = int(np.searchsorted(self.ends, index, side="right"))
        index -= int(self.ends[file - 1]) if file else 0
        with self.texts[file].open("rb") as text:
            text.seek(int(self.files[file].index[index]))
            return self._parse(text.readline())


class Table:
    """Rows of a ``datasets.Dataset``."""

    def __init__(self, table: Dataset, columns: Columns, name: str, on_bad_row: OnBadRow = "error") -> None:
        self.table = table
        self.columns = columns
        cached = [Path(entry["filename"]) for entry in table.cache_files]
        assert cached, "a table in memory has no files to name its index by"
        self.rows = checked(cached, columns, partial(self._check, name), on_bad_row)
        _refuse_empty([self.rows], name)

    def _check(self, name: str) -> Iterator[int | str]:
        for i, record in enumerate(tqdm(self.table, desc=f"checking {name}", unit=" rows", delay=3)):
            try:
                parse_row(record, self.columns)
                yield i
            except BadRow as fault:
                yield f"{name}, row {i}: {fault}"

    @property
    def skipped(self) -> str | None:
        return _skipped([self.rows])

    def __len__(self) -> int:
        return len(self.rows.index)

    def __getitem__(self, index: int) -> Row:
        return parse_row(self.table[int(self.rows.index[index])], self.columns)


class HubStream:
    """Rows of a ``datasets.IterableDataset``, checked as they come.

    n_rows: rows of the set where it says so, bad ones included.
    """

    def __init__(
        self,
        stream: IterableDataset,
        columns: Columns,
        name: str,
        on_bad_row: OnBadRow = "error",
        n_rows: int | None = None,
        shuffle_buffer: int = 10_000,
    ) -> None:
        self.stream = stream
        self.columns = columns
        self.name = name
        self.on_bad_row = on_bad_row
        self.n_rows = n_rows
        self.shuffle_buffer = shuffle_buffer

    def shuffled(self, seed: int, epoch: int, max_rows: int | None = None, warn: bool = True) -> Iterator[Row]:
        """One epoch of the first ``max_rows`` rows, in an order that depends on seed and epoch alone.

        warn: of the first bad row that is left out, and in the end of their number.
        """
        stream = self.stream if max_rows is None else self.stream.take(max_rows)
        stream = stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        stream.set_epoch(epoch)
        n_bad = 0
        # by ``iter(1)``, which unlike plain iteration gives each worker of a DataLoader all of the stream
        for i, record in enumerate(stream.iter(1)):
            try:
                row = parse_row({name: cell for name, [cell] in record.items()}, self.columns)
            except BadRow as fault:
                sentence = f"{self.name}, row {i} of the shuffled stream: {fault}"
                if self.on_bad_row == "error":
                    raise ValueError(f"{sentence} (to leave such rows out, set data.on_bad_row to skip)") from None
                if warn and n_bad == 0:
                    warnings.warn(f"{sentence}; such rows are left out", stacklevel=2)
                n_bad += 1
                continue
            yield row
        if warn and n_bad:
            warnings.warn(f"{self.name}: {n_bad} bad rows were left out of epoch {epoch}", stacklevel=2)


def local_files(path: str) -> list[Path] | None:
    """The data files of ``path``: a file, a folder or a glob, sorted; None where it can only be a Hub id."""
    here = Path(path).expanduser()
    if here.is_dir():
        files = sorted(file for file in here.iterdir() if file.name.endswith(SUFFIXES))
    elif here.is_file():
        files = [here]
    elif has_magic(path):
        files = sorted(map(Path, glob(str(here), recursive=True)))
    elif path.endswith(SUFFIXES) or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"data.train is {path!r}: there is no such file or folder")
    else:
        return None
    wrong = [file.name for file in files if not file.name.endswith(SUFFIXES)]
    if wrong or not files:
        found = wrong[0] if wrong else "none"
        raise ValueError(f"data.train is {path!r}: expected files that end in {', '.join(SUFFIXES)}, found {found}")
    return files


def open_files(files: list[Path], columns: Columns, on_bad_row: OnBadRow = "error") -> JsonLines | Table:
    """ValueError where a file cannot be read, and where a row is bad, by file and line."""
    parquet = [file for file in files if file.suffix == ".parquet"]
    if not parquet:
        return JsonLines(files, columns, on_bad_row)
    if len(parquet) < len(files):
        raise ValueError(
            f"data.train names Parquet ({parquet[0].name}) and JSON lines at once: name one kind by a glob"
        )
    from datasets import Dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    name = ", ".join(file.name for file in parquet[:3])
    try:
        table: Any = Dataset.from_parquet(list(map(str, parquet)), cache_dir=str(cache_folder() / "datasets"))
    except (DatasetsError, ArrowException) as error:
        raise ValueError(f"{name} cannot be read as Parquet: {error.__cause__ or error}") from error
    return Table(table, columns, name, on_bad_row)


def open_hub(
    name: str,
    columns: Columns,
    on_bad_row: OnBadRow = "error",
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = True,
) -> HubStream | Table:
    """FileNotFoundError where the Hub has no such data set, ConnectionError where it cannot be reached."""
    from datasets import load_dataset

    try:
        data: Any = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.train is {name!r}: no file or folder here, no data set on the Hub") from error
    except OSError as error:
        raise ConnectionError(
            f"data.train is {name!r}, no file or folder here, and the Hub cannot be reached ({type(error).__name__}): "
            "connect to it, or set data.train to JSONL or Parquet files"
        ) from error
    if not streaming:
        return Table(data, columns, name, on_bad_row)
    splits = data.info.splits or {}
    return HubStream(data, columns, name, on_bad_row, n_rows=splits[split].num_examples if split in splits else None)


def _skipped(files: list[Checked]) -> str | None:
    n_bad = sum(file.n_bad for file in files)
    if not n_bad:
        return None
    n_good = sum(len(file.index) for file in files)
    first = next(chain.from_iterable(file.first_bad for file in files))
    return f"{n_bad} of {n_bad + n_good} rows are bad and were left out; the first: {first}"


def _refuse_empty(files: list[Checked], name: str) -> None:
    if not any(len(file.index) for file in files):
        first = next(chain.from_iterable(file.first_bad for file in files), "the file is empty")
        raise ValueError(f"{name} holds no usable row: {first}")

"""Retrieval collections in the BEIR folder layout (Thakur et al. 2021).

    corpus.jsonl       {"_id": ..., "title": ..., "text": ...}       title optional
    queries.jsonl      {"_id": ..., "text": ...}
    qrels/SPLIT.tsv    query-id <tab> corpus-id <tab> score          with or without a header line

A collection holds one split: the queries are those that its qrels judge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QRELS_HEADER = ("query-id", "corpus-id", "score")


@dataclass
class Collection:
    """name: what reports call it. corpus, queries: id -> text. qrels: query id -> document id -> grade."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str | None = None) -> Collection:
    """Read one split of a BEIR folder; a document is its title and text joined by a space.

    split: the stem of a file in ``qrels/``; by default the only one there, else test, else dev.
    FileNotFoundError for a missing file or split; ValueError with file and line for broken JSON, a missing key, a
    repeated id, a judgement of an unknown query or document, and an empty corpus or split.
    """
    folder = Path(folder)
    corpus_file, queries_file = folder / "corpus.jsonl", folder / "queries.jsonl"
    qrels_file = _qrels_file(folder, split)
    corpus = {key: f"{row.get('title') or ''} {row['text']}".strip() for key, row in _rows(corpus_file)}
    if not corpus:
        raise ValueError(f"{corpus_file} holds no document")
    queries = {key: row["text"].strip() for key, row in _rows(queries_file)}

    qrels: dict[str, dict[str, int]] = {}
    for where, query, document, grade in _judgements(qrels_file):
        if query not in queries:
            raise ValueError(f"{where}: query {query!r} is not in {queries_file.name}")
        if document not in corpus:
            raise ValueError(f"{where}: document {document!r} is not in {corpus_file.name}")
        qrels.setdefault(query, {})[document] = grade
    if not qrels:
        raise ValueError(f"{qrels_file} holds no judgement")
    return Collection(folder.resolve().name, corpus, {q: text for q, text in queries.items() if q in qrels}, qrels)


def write_beir(collection: Collection, folder: str | Path, split: str = "test") -> None:
    """Write a collection as a BEIR folder that ``read_beir`` gives back unchanged, but for its name."""
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for file, texts in (("corpus.jsonl", collection.corpus), ("queries.jsonl", collection.queries)):
        lines = (json.dumps({"_id": key, "text": text}, ensure_ascii=False) for key, text in texts.items())
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    judged = [(q, d, str(grade)) for q, grades in collection.qrels.items() for d, grade in grades.items()]
    table = "".join("\t".join(row) + "\n" for row in [QRELS_HEADER, *judged])
    (folder / "qrels" / f"{split}.tsv").write_text(table, encoding="utf-8")


def _qrels_file(folder: Path, split: str | None) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    if not found:
        raise FileNotFoundError(f"{folder} is not a BEIR folder: there is no qrels/SPLIT.tsv in it")
    if split is None:
        split = found[0] if len(found) == 1 else next((name for name in ("test", "dev") if name in found), None)
        if split is None:
            raise ValueError(f"{folder / 'qrels'} holds {', '.join(found)}, neither test nor dev: name the split")
    if split not in found:
        raise FileNotFoundError(f"there is no split {split!r} in {folder / 'qrels'}, which holds {', '.join(found)}")
    return folder / "qrels" / f"{split}.tsv"


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, row) of each line, with its "text" known to be a string."""
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} is not a BEIR folder: there is no {file.name} in it")
    seen = set()
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: broken JSON, {error}") from None
            missing = [key for key in ("_id", "text") if not isinstance(row, dict) or row.get(key) is None]
            if missing:
                got = f"an object with {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ValueError(f"{where}: expected an object with _id and text, got {got}")
            key = str(row["_id"])
            if key in seen:
                raise ValueError(f"{where}: the id {key!r} appears a second time")
            if not isinstance(row["text"], str):
                raise ValueError(f"{where}: text must be a string, got a {type(row['text']).__name__}")
            seen.add(key)
            yield key, row


def _judgements(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """(file:line, query id, document id, grade)."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            cells = tuple(line.rstrip("\r\n").split("\t"))
            if not line.strip() or (number == 1 and cells == QRELS_HEADER):
                continue
            where = f"{file}:{number}"
            if len(cells) != 3:
                raise ValueError(f"{where}: expected query-id, corpus-id and score between tabs, got {line.strip()!r}")
            try:
                grade = int(cells[2])
            except ValueError:
                raise ValueError(f"{where}: the score must be a whole number, got {cells[2]!r}") from None
            yield where, cells[0], cells[1], grade

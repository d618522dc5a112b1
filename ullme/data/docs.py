"""The built-in corpus: search the documentation of the Python packages that are installed.

    query = a docstring's summary      positive = its body      negatives = other bodies that BM25 ranks high for it

For a given set of installed versions the rows are the same everywhere. They are kept under a fingerprint of those
versions in ``$ULLME_CACHE`` (default ``~/.cache/ullme``).

Invariant: the packages in ``HELD_OUT`` are in no training row and in no pretraining text, nor is a query or a passage
with the same words as one of theirs.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ullme.data.beir import Collection
from ullme.data.cache import cache_folder
from ullme.data.docstrings import SKIPPED_PACKAGES, Docstring, read_docstrings, site_packages
from ullme.data.mining import mine_negatives, word_key

Split = Literal["test", "validation"]
HELD_OUT: dict[Split, tuple[str, ...]] = {"test": ("networkx", "scipy"), "validation": ("fsspec", "joblib")}

MIN_QUERY_WORDS = 4
MAX_QUERY_CHARS = 200
MIN_PASSAGE_CHARS = 60
MAX_PASSAGE_CHARS = 800
MAX_TEXT_CHARS = 4000
MAX_SAME_OPENING = 4  # pretraining texts that may begin with the same words: generated documentation repeats itself

_RULES = 2  # raise it when this file or docstrings.py changes what a row is: it is part of the cache key
_BOILERPLATE = re.compile(
    r"metadata routing|set_\w+_request|auto\w*[ -]?generated|proto message|see base class|deprecated alias|"
    r"instantiat\w+ a configuration with the defaults|inherits? from \[?(?:PreTrained|Pretrained)|helper function for",
    re.IGNORECASE,
)
_NO_SUMMARY = re.compile(
    r"(?:args|arguments|attributes|parameters|params|returns?|yields?|raises)\s*:|\w+ \(torch\.", re.I
)


class Pair(NamedTuple):
    package: str  # top-level name: "scipy"
    name: str  # "scipy.linalg._basic.solve"
    query: str
    passage: str


def fingerprint(root: Path | None = None) -> str:
    """16 hex digits that change with any version installed under ``root`` and with the rules of the corpus."""
    root = root or site_packages()
    installed = {(one.name.lower(), one.version) for one in distributions(path=[str(root)])}
    installed |= {(path.name, "") for path in root.iterdir() if (path / "__init__.py").exists()}
    counted = sorted(one for one in installed if one[0] not in SKIPPED_PACKAGES)
    return blake2b(repr((_RULES, HELD_OUT, counted)).encode(), digest_size=8).hexdigest()


def docs_pairs(root: Path | None = None, progress: bool = True) -> list[Pair]:
    """All pairs, held-out packages first, sorted by name; no query and no passage appears twice.

    root: a site-packages folder, by default the one of this environment.
    """
    root = root or site_packages()
    file = cache_folder() / "docs" / fingerprint(root) / "pairs.jsonl"
    if not file.exists():
        _write_rows(file, (pair._asdict() for pair in make_pairs(read_docstrings(root, progress))))
    with file.open(encoding="utf-8") as lines:
        return [Pair(**json.loads(line)) for line in lines]


def docs_triples(negatives: int = 8, root: Path | None = None, progress: bool = True) -> Path:
    """A JSONL file of training rows {"query", "pos": [one passage], "neg": [up to ``negatives`` passages]}.

    The negatives are mined by BM25 among the passages of the training packages, hardest first.
    """
    root = root or site_packages()
    file = cache_folder() / "docs" / fingerprint(root) / f"triples-{negatives}.jsonl"
    if not file.exists():
        pairs = [pair for pair in docs_pairs(root, progress) if pair.package not in _held_out()]
        if not pairs:
            raise ValueError(f"no package under {root} has docstrings to train on")
        queries, passages = [pair.query for pair in pairs], [pair.passage for pair in pairs]
        mined = mine_negatives(queries, [[p] for p in passages], passages, n=negatives, progress=progress)
        rows = zip(queries, passages, mined, strict=True)
        _write_rows(file, ({"query": query, "pos": [passage], "neg": neg} for query, passage, neg in rows))
    return file


def docs_collection(split: Split = "test", root: Path | None = None, progress: bool = True) -> Collection:
    """The held-out packages of ``split`` as a retrieval collection: each summary has one relevant body."""
    if split not in HELD_OUT:
        raise ValueError(f"the built-in corpus has the splits {' and '.join(HELD_OUT)}, not {split!r}")
    root = root or site_packages()
    pairs = [pair for pair in docs_pairs(root, progress) if pair.package in HELD_OUT[split]]
    if not pairs:
        packages = " and ".join(HELD_OUT[split])
        raise ValueError(f"the {split} split of the built-in corpus is made of {packages}; neither is under {root}")
    repeats: Counter[str] = Counter()
    collection = Collection("docs" if split == "test" else f"docs-{split}", {}, {}, {})
    for pair in pairs:
        repeats[pair.name] += 1
        document = pair.name if repeats[pair.name] == 1 else f"{pair.name}#{repeats[pair.name]}"
        query = f"query:{document}"
        collection.corpus[document] = pair.passage
        collection.queries[query] = pair.query
        collection.qrels[query] = {document: 1}
    return collection


def docs_texts(root: Path | None = None, progress: bool = True) -> list[tuple[str, str]]:
    """Pretraining text: (summary, whole body) of every docstring of the training packages; either may be empty."""
    docstrings = read_docstrings(root or site_packages(), progress)
    reserved = {key for pair in make_pairs(docstrings) if pair.package in _held_out() for key in _keys(pair)}
    openings: Counter[str] = Counter()
    texts: dict[str, tuple[str, str]] = {}
    for docstring in docstrings:
        if docstring.package in _held_out():
            continue
        summary, body = docstring.summary, docstring.body
        key = word_key(f"{summary} {body}")
        if len(key) < 20 or key in texts or _BOILERPLATE.search(key):
            continue
        if {f"q {word_key(summary)}", f"p {word_key(_shortened(body))}"} & reserved:
            continue
        openings[key[:80]] += 1
        if openings[key[:80]] <= MAX_SAME_OPENING:
            texts[key] = (summary, body[:MAX_TEXT_CHARS])
    return list(texts.values())


def make_pairs(docstrings: Iterable[Docstring]) -> list[Pair]:
    """The useful pairs; where two share a query or a passage the first is kept, a held-out one before the others."""
    ordered = sorted(docstrings, key=lambda one: (one.package not in _held_out(), one))
    seen: set[str] = set()
    pairs = []
    for docstring in ordered:
        pair = Pair(docstring.package, docstring.name, docstring.summary, _shortened(docstring.body))
        if _is_useful(pair) and seen.isdisjoint(_keys(pair)):
            seen |= _keys(pair)
            pairs.append(pair)
    return pairs


def _is_useful(pair: Pair) -> bool:
    """Words enough on both sides, mostly letters, not generated, and the summary not given away by the passage."""
    words = re.findall(r"[A-Za-z]{2,}", pair.query)
    letters = sum(c.isalpha() or c.isspace() for c in pair.passage)
    return (
        len(words) >= MIN_QUERY_WORDS
        and len(pair.query) <= MAX_QUERY_CHARS
        and len(pair.passage) >= MIN_PASSAGE_CHARS
        and letters >= 0.7 * len(pair.passage)
        and not _NO_SUMMARY.match(pair.query)
        and not _BOILERPLATE.search(f"{pair.query} {pair.passage}")
        and word_key(pair.query) not in word_key(pair.passage)
    )


def _shortened(body: str) -> str:
    return body if len(body) <= MAX_PASSAGE_CHARS else body[: MAX_PASSAGE_CHARS + 1].rsplit(" ", 1)[0]


def _keys(pair: Pair) -> set[str]:
    return {f"q {word_key(pair.query)}", f"p {word_key(pair.passage)}"}


def _held_out() -> set[str]:
    return {package for packages in HELD_OUT.values() for package in packages}


def _write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Written aside, then renamed: another process sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as aside:
        aside.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(aside.name, file)

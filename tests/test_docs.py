"""The built-in corpus on a made-up site-packages folder: what is read, what is held out, what is cached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ullme.data.docs import HELD_OUT, docs_collection, docs_pairs, docs_texts, docs_triples, fingerprint
from ullme.data.docstrings import plain, read_docstrings, source_files, split
from ullme.data.mining import word_key

BODY = "It walks over the {} one after the other, keeps what was asked for and gives the rest back to its caller."


def function(name: str, summary: str, body: str) -> str:
    return f'def {name}():\n    """{summary}.\n\n    {body}\n    """\n\n\n'


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Two training packages, the four held-out ones, and what must not be read."""
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "site-packages"
    held_out = [name for names in HELD_OUT.values() for name in names]
    things = {name: [f"{name} thing {i}" for i in range(6)] for name in ["alpha", "beta", *held_out]}
    for package, nouns in things.items():
        (root / package / "tests").mkdir(parents=True)
        code = [function("f", f"Filter every single {noun} here", BODY.format(noun)) for noun in nouns]
        (root / package / "__init__.py").write_text("".join(code))
        (root / package / "tests" / "test_it.py").write_text(function("t", "Test that nothing is read", BODY))
    copied = function("copied", "Filter every single scipy thing 0 here", BODY.format("copy"))
    copied += function("pasted", "Paste whatever was copied before", BODY.format("SCIPY thing 1"))
    (root / "alpha" / "copies.py").write_text(copied)
    (root / "alpha" / "broken.py").write_text("def f(:\n")
    (root / "alpha" / "_vendor" / "scipy").mkdir(parents=True)
    (root / "alpha" / "_vendor" / "scipy" / "v.py").write_text(function("v", "Vendored code is not read", BODY))
    (root / "beta" / "danger.py").write_text("raise SystemExit('imported')\n")
    (root / "ullme").mkdir()
    (root / "ullme" / "__init__.py").write_text(function("own", "Our own text is not read", BODY))
    return root


def test_training_rows_hold_no_held_out_text(root):
    rows = [json.loads(line) for line in docs_triples(root=root).read_text().splitlines()]
    assert len(rows) == 12  # six of alpha, six of beta; the two copies of scipy's text left out
    texts = " ".join(text for row in rows for text in [row["query"], *row["pos"], *row["neg"]]).lower()
    assert not any(name in texts for names in HELD_OUT.values() for name in names)
    assert "vendored" not in texts
    assert "own text" not in texts
    for row in rows:
        assert row["neg"]
        assert word_key(row["pos"][0]) not in map(word_key, row["neg"])


def test_pretraining_text_holds_no_held_out_text(root):
    texts = docs_texts(root, progress=False)
    assert len(texts) == 12
    assert not any(name in " ".join(texts[i]) for i in range(12) for names in HELD_OUT.values() for name in names)


@pytest.mark.parametrize("split_name", ["test", "validation"])
def test_collection_is_the_held_out_packages(root, split_name):
    collection = docs_collection(split_name, root)
    assert {name.split(".")[0] for name in collection.corpus} == set(HELD_OUT[split_name])
    assert len(collection.queries) == len(collection.corpus) == 12
    for query, grades in collection.qrels.items():
        [document] = grades
        assert query == f"query:{document}"
        noun = collection.queries[query].removeprefix("Filter every single ").removesuffix(" here")
        assert noun in collection.corpus[document]


def test_same_packages_give_the_same_rows(root, tmp_path, monkeypatch):
    pairs, triples = docs_pairs(root), docs_triples(2, root).read_bytes()
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path / "another"))
    assert docs_pairs(root) == pairs
    assert docs_triples(2, root).read_bytes() == triples
    assert all(len(json.loads(line)["neg"]) == 2 for line in triples.splitlines())


def test_rows_are_kept_until_a_version_changes(root):
    file = docs_triples(root=root)
    before = fingerprint(root)
    (root / "alpha" / "__init__.py").write_text("")
    assert docs_triples(root=root) == file
    (root / "pip").mkdir()  # differs between environments made from the same constraints
    (root / "pip" / "__init__.py").touch()
    assert fingerprint(root) == before
    info = root / "alpha-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alpha\nVersion: 2.0\n")
    assert fingerprint(root) != before
    assert len(docs_triples(root=root).read_text().splitlines()) == 6


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="networkx and scipy"):
        docs_collection(root=tmp_path / "empty")
    with pytest.raises(ValueError, match="no package"):
        docs_triples(root=tmp_path / "empty")
    with pytest.raises(ValueError, match="'dev'"):
        docs_collection("dev", tmp_path / "empty")


def test_order_of_files_is_fixed(root):
    names = [str(path) for _, path in source_files(root)]
    assert names == sorted(names)
    assert {package for package, _ in source_files(root)} == {"alpha", "beta", "networkx", "scipy", "fsspec", "joblib"}


def test_names_of_nested_and_added_docstrings(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "two.py").write_text(
        '"""About the module."""\n'
        'class A:\n    """About A."""\n    def b(self):\n        """About b."""\n'
        "try:\n    import x\nexcept ImportError:\n    pass\n"
        'if True:\n    def c():\n        """About c."""\n'
        'add_docstr(f, r"""f(x) -> y\n\nAbout f.\n""".format(**common))\n'
    )
    found = [(docstring.name, docstring.summary) for docstring in read_docstrings(tmp_path, progress=False)]
    assert found == [
        ("one.two", "About the module"),
        ("one.two.A", "About A"),
        ("one.two.A.b", "About b"),
        ("one.two.c", "About c"),
        ("one.two:13", "About f"),
    ]


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("Solve it.", ("Solve it", "")),
        ("solve(a, b) -> x\n\nSolve it.\n\nBy elimination.", ("Solve it", "By elimination.")),
        ("Solve for x. Slow.\n\nNotes\n-----\nStable.", ("Solve for x", "Slow. Notes Stable.")),
        ("Solve it\nwell.\n\nExamples\n--------\n>>> solve()\n1", ("Solve it well", "")),
        ("Solve it.\n\nArgs:\n    a: left\n\nExample:\n    solve(1)", ("Solve it", "Args: a: left")),
        ("Solve it.\n\n```py\nsolve()\n```\nWith care.", ("Solve it", "With care.")),
        ("", ("", "")),
    ],
)
def test_summary_and_body(text, halves):
    assert split(text) == halves


def test_markup_is_removed():
    text = "See :func:`~numpy.solve`, ``x`` and `this <https://x.y>`_ of **k.\n.. versionadded:: 1.2\n.. note:: Slow."
    assert plain(text) == "See numpy.solve, x and this of k. Slow."

"""BEIR folders: what is read back, which split is taken, and that an error names the file and the line."""

from __future__ import annotations

import json

import pytest

from ullme.data.beir import Collection, read_beir, write_beir

COLLECTION = Collection(
    name="tiny",
    corpus={"d1": "a graph has nodes", "d2": "a matrix has rows", "d3": ""},
    queries={"q1": "graph nodes", "q2": "rows of a matrix"},
    qrels={"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2}},
)


@pytest.fixture
def folder(tmp_path):
    write_beir(COLLECTION, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_what_is_written_is_read_back(folder):
    assert read_beir(folder) == COLLECTION


def test_title_and_text_are_joined(folder):
    rows = [{"_id": 1, "title": "Graphs", "text": "have nodes"}, {"_id": "d2", "title": None, "text": " rows "}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (folder / "qrels" / "test.tsv").write_text("q1\t1\t1\n")
    assert read_beir(folder).corpus == {"1": "Graphs have nodes", "d2": "rows"}


def test_header_is_optional_and_only_judged_queries_stay(folder):
    (folder / "qrels" / "test.tsv").write_text("q2\td2\t1\r\n")
    read = read_beir(folder)
    assert read.queries == {"q2": "rows of a matrix"}
    assert read.qrels == {"q2": {"d2": 1}}


@pytest.mark.parametrize(
    ("splits", "taken"), [(["odd"], "odd"), (["train", "dev", "test"], "test"), (["train", "dev"], "dev")]
)
def test_default_split(folder, splits, taken):
    (folder / "qrels" / "test.tsv").unlink()
    for i, split in enumerate(splits, 1):
        (folder / "qrels" / f"{split}.tsv").write_text(f"q1\td1\t{i}\n")
    assert read_beir(folder).qrels == {"q1": {"d1": splits.index(taken) + 1}}
    assert read_beir(folder, splits[0]).qrels == {"q1": {"d1": 1}}


def test_ambiguous_and_missing_splits_are_named(folder):
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "a.tsv")
    (folder / "qrels" / "b.tsv").write_text("q1\td1\t1\n")
    with pytest.raises(ValueError, match="a, b"):
        read_beir(folder)
    with pytest.raises(FileNotFoundError, match=r"'dev'.*a, b"):
        read_beir(folder, "dev")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": \n', r"corpus\.jsonl:2: broken JSON"),
        ("corpus.jsonl", '{"_id": "d1", "body": "a"}\n', r"corpus\.jsonl:1: .*_id, body"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n\n{"_id": "d1", "text": "b"}\n', r"corpus\.jsonl:3: .*'d1'"),
        ("corpus.jsonl", "\n", r"corpus\.jsonl holds no document"),
        ("queries.jsonl", "[1]\n", r"queries\.jsonl:1: .*list"),
        ("queries.jsonl", '{"_id": "q1", "text": 3}\n', r"queries\.jsonl:1: .*int"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n", r"test\.tsv:2: document 'd9'"),
        ("qrels/test.tsv", "q9\td1\t1\n", r"test\.tsv:1: query 'q9'"),
        ("qrels/test.tsv", "q1 d1 1\n", r"test\.tsv:1: .*tabs"),
        ("qrels/test.tsv", "q1\td1\thigh\n", r"test\.tsv:1: .*'high'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", r"test\.tsv holds no judgement"),
    ],
)
def test_error_names_file_and_line(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_beir(folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"not a BEIR folder.*" + file.split("/")[0]):
        read_beir(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_beir(tmp_path / "nowhere")

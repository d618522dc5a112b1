"""What the reading of training rows promises.

- every way to write a row gives the same row; every bad row is one sentence with its file and line
- ranks and workers together read each row once; the order is a function of (seed, epoch) alone
- of a row's positives one is drawn, of its negatives at most n, by (seed, epoch, row); a positive is never a negative
- JSON lines, gzip, Parquet and a stream hold the same rows; a changed file is read anew
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ullme.data.rows import BadRow, Columns, Row, normalized, parse_row, text_hash
from ullme.data.sources import HubStream, JsonLines, Table, local_files, open_files, open_hub
from ullme.data.triples import TripleBatches, TripleSet, draw

ROWS = [
    {"query": f"query {i}", "pos": [f"positive {i}"], "neg": [f"negative {i} {j}" for j in range(i % 4)]}
    for i in range(23)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, rows: list) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", ROWS)


def queries(batches) -> list[str]:
    return [triple.query for batch in batches for triple in batch]


# rows


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"query": "q", "pos": ["a"], "neg": ["b", "c"]}, Columns()),
        ({"query": "q", "pos": "a", "neg": ["b", {"text": "c"}]}, Columns()),
        ({"query": "q", "pos": [{"title": "", "text": "a"}], "neg": [{"text": "b"}, "c"]}, Columns()),
        ({"query": "q", "pos": {"docid": [7], "text": ["a"]}, "neg": {"docid": [8, 9], "text": ["b", "c"]}}, Columns()),
        ({"x": "q", "y": "a", "n1": "b", "n2": "c", "n3": None}, Columns("x", "y", ["n1", "n2", "n3"])),
    ],
)
def test_a_row_may_be_written_in_many_ways(record: dict, columns: Columns) -> None:
    assert parse_row(record, columns) == Row("q", ["a"], ["b", "c"])


def test_title_and_text_are_joined_and_negatives_may_be_absent() -> None:
    record = {"query": "q", "pos": [{"title": "T", "text": "body"}], "neg": None}
    assert parse_row(record, Columns()) == Row("q", ["T body"], [])
    assert parse_row({"query": "q", "pos": "a"}, Columns(negative=None)) == Row("q", ["a"], [])


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"query": " ", "pos": ["a"], "neg": []}, "query is empty"),
        ({"query": "q", "pos": ["a", "\t"], "neg": []}, "positive 1 is empty"),
        ({"query": "q", "pos": ["a"], "neg": ["b", ""]}, "negative 1 is empty"),
        ({"query": "q", "pos": [{"title": "", "text": ""}], "neg": []}, "positive 0 is empty"),
        ({"query": "q", "pos": [{"title": "T"}], "neg": []}, "positive 0 has no text"),
        ({"query": "q", "pos": [], "neg": []}, "no positive: the column 'pos' is empty"),
        ({"query": "q", "pos": None, "neg": []}, "no positive"),
        ({"query": 3, "pos": ["a"], "neg": []}, "query is not a text but int"),
        ({"query": "q", "pos": ["a"], "neg": [["b"]]}, "negative 0 is not a text but list"),
        ({"query": "q", "pos": ["\ud800"], "neg": []}, "positive 0 holds half a character"),
        (
            {"question": "q", "pos": ["a"], "neg": []},
            "no column 'query'; found 'question', 'pos', 'neg': set data.query",
        ),
        ({"query": "q", "neg": []}, "no column 'pos'; found 'query', 'neg': set data.positive_column"),
        ({"query": "q", "pos": ["a"]}, "no column 'neg'; found 'query', 'pos': set data.negative_column"),
        ([1, 2], "expected an object with the column 'query', got list"),
    ],
)
def test_a_bad_row_is_one_sentence(record: object, sentence: str) -> None:
    with pytest.raises(BadRow) as refusal:
        parse_row(record, Columns())
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_text_is_itself_whatever_its_white_space() -> None:
    assert text_hash(" a\n b\t") == text_hash("a b") != text_hash("a  c")
    assert normalized("\u00a0a\u2003b ") == "a b"
    assert text_hash("a b") == 2952434739088078779, "the same on every machine"
    assert -(2**63) <= text_hash("x") < 2**63


# sources


def test_every_format_holds_the_same_rows(tmp_path: Path, train: Path) -> None:
    from datasets import Dataset

    plain = open_files([train], Columns())
    expected = [plain[i] for i in range(len(plain))]
    assert [row.query for row in expected] == [row["query"] for row in ROWS]
    packed = open_files([write(tmp_path / "train.jsonl.gz", ROWS)], Columns())
    assert [packed[i] for i in range(len(packed))] == expected
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "train.parquet"))
    table = open_files([tmp_path / "train.parquet"], Columns())
    assert isinstance(table, Table)
    assert [table[i] for i in range(len(table))] == expected
    stream = HubStream(Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3), Columns(), "a/b")
    assert Counter(row.query for row in stream.shuffled(0, 0)) == Counter(row.query for row in expected)


def test_files_of_a_folder_follow_one_another(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl.gz", ROWS[5:9])
    write(tmp_path / "a.jsonl", ["", *ROWS[:5], "  "])
    write(tmp_path / "notes.txt", ["no row"])
    files = local_files(str(tmp_path))
    assert files is not None
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz"]
    assert local_files(str(tmp_path / "*.jsonl*")) == files
    source = open_files(files, Columns())
    assert [source[i].query for i in range(len(source))] == [row["query"] for row in ROWS[:9]]


def test_a_changed_file_is_checked_anew(tmp_path: Path, train: Path) -> None:
    assert len(open_files([train], Columns())) == len(ROWS)
    write(train, [*ROWS, {"query": "new", "pos": "new", "neg": []}])
    source = open_files([train], Columns())
    assert source[len(ROWS)].query == "new"
    with pytest.raises(ValueError, match="no column 'text'"):
        open_files([train], Columns(query="text"))


def test_nothing_half_written_stays_in_the_cache(cache: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [*ROWS, "{"])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 24"):
        open_files([bad], Columns())
    short = tmp_path / "short.jsonl.gz"
    short.write_bytes(write(tmp_path / "whole.jsonl.gz", ROWS).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"short\.jsonl\.gz is not a whole gzip file"):
        open_files([short], Columns())
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"query": "q", "pos": ["a"', "line 3: broken JSON, "),
        ("[" * 100_000, "line 3: broken JSON, "),
        ('{"query": "q", "pos": [], "neg": []}', "line 3: no positive"),
        ('{"query": "q", "pos": ["a"], "neg": [" "]}', "line 3: negative 0 is empty"),
        ('{"query": "q", "pos": ["\\ud800"], "neg": []}', "line 3: positive 0 holds half a character"),
        ('{"query": "q", "positive": ["a"]}', "line 3: no column 'pos'; found 'query', 'positive'"),
    ],
)
def test_a_bad_line_stops_or_is_left_out(tmp_path: Path, line: str, sentence: str) -> None:
    path = write(tmp_path / "train.jsonl", [ROWS[0], ROWS[1], line, ROWS[2], line])
    for _ in range(2):  # computed, then from the cache
        with pytest.raises(ValueError, match=r"train\.jsonl") as refusal:
            open_files([path], Columns())
        assert f"train.jsonl, {sentence}" in str(refusal.value)
        assert "set data.on_bad_row to skip" in str(refusal.value)
        source = open_files([path], Columns(), "skip")
        assert [source[i].query for i in range(len(source))] == ["query 0", "query 1", "query 2"]
        assert source.skipped is not None
        assert source.skipped.startswith(f"2 of 5 rows are bad and were left out; the first: train.jsonl, {sentence}")


def test_bytes_that_are_no_utf8_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"query": "\xff"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: broken JSON, .*utf-8"):
        open_files([path], Columns())


def test_bad_rows_of_a_table_and_of_a_stream(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([*ROWS[1:4], {"query": "", "pos": ["a"], "neg": []}])
    rows.to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(ValueError, match=r"t\.parquet, row 3: query is empty"):
        open_files([tmp_path / "t.parquet"], Columns())
    assert len(open_files([tmp_path / "t.parquet"], Columns(), "skip")) == 3
    with pytest.raises(ValueError, match=r"a/b, row \d of the shuffled stream: query is empty"):
        list(HubStream(rows.to_iterable_dataset(), Columns(), "a/b").shuffled(0, 0))
    with (
        pytest.warns(UserWarning, match="query is empty; such rows are left out"),
        pytest.warns(UserWarning, match="a/b: 1 bad rows were left out of epoch 0"),
    ):
        assert len(list(HubStream(rows.to_iterable_dataset(), Columns(), "a/b", "skip").shuffled(0, 0))) == 3


def test_places_without_rows_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.train is '.*none\.jsonl': there is no such file or folder"):
        TripleSet(str(tmp_path / "none.jsonl")).open()
    with pytest.raises(ValueError, match=r"expected files that end in \.jsonl, \.jsonl\.gz, \.parquet, found none"):
        TripleSet(str(tmp_path)).open()
    with pytest.raises(ValueError, match=r"found rows\.csv"):
        TripleSet(str(write(tmp_path / "rows.csv", ["a,b"]))).open()
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no usable row: the file is empty"):
        TripleSet(str(write(tmp_path / "empty.jsonl", []))).open()
    with pytest.raises(ValueError, match=r"holds no usable row: one\.jsonl, line 1: no column 'query'"):
        TripleSet(str(write(tmp_path / "one.jsonl", [{"a": "b"}])), on_bad_row="skip").open()
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read as Parquet: "):
        TripleSet(str(tmp_path / "t.parquet")).open()
    with pytest.raises(ValueError, match=r"Parquet .* and JSON lines at once"):
        TripleSet(str(tmp_path)).open()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_id_without_network_is_one_sentence(streaming: bool) -> None:
    with pytest.raises(
        ConnectionError, match=r"data\.train is 'someone/some-triples', no file or folder here, and the Hub"
    ):
        open_hub("someone/some-triples", Columns(), streaming=streaming)


# what is drawn of a row


def test_draws_are_a_function_of_seed_epoch_and_row() -> None:
    row = Row("q", ["p0", "p1", "p2"], [f"n{i}" for i in range(20)])
    assert draw(row, 8, 0, 1, 2) == draw(row, 8, 0, 1, 2)
    draws = [draw(row, 8, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(negatives) for _, negatives in draws}) == 4
    counts = Counter(draw(row, 8, 0, epoch, 0)[0] for epoch in range(300))
    assert set(counts) == set(row.positives)
    assert min(counts.values()) > 60, "each positive about as often"


def test_negatives_are_at_most_n_distinct_and_no_positives() -> None:
    row = Row("q", ["the  answer", "other"], ["a", "the answer", " a", "b", "c", "other\n"])
    for epoch in range(20):
        positive, negatives = draw(row, 2, 0, epoch, 0)
        assert positive in row.positives
        assert len(negatives) == 2
        assert {normalized(text) for text in negatives} < {"a", "b", "c"}
    assert sorted(normalized(text) for text in draw(row, 8, 0, 0, 0)[1]) == ["a", "b", "c"], (
        "fewer where there are fewer"
    )
    assert draw(row, 0, 0, 0, 0)[1] == []


# batches


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_workers_read_each_row_once_in_the_same_order(train: Path, world_size: int, workers: int) -> None:
    whole = list(TripleBatches(TripleSet(str(train)), 4, 2, seed=3, epoch=1))
    parts = []
    for rank in range(world_size):
        mine = TripleBatches(TripleSet(str(train)), 4, 2, 3, rank, world_size, epoch=1)
        loader = DataLoader(mine, batch_size=None, num_workers=workers, collate_fn=list)
        assert len(loader) == 5
        parts.append(list(loader))
    joined = [[triple for part in parts for triple in part[b]] for b in range(5)]
    assert joined == whole
    seen = Counter(queries(joined))
    assert len(seen) == 20, "the three rows after the last whole batch are left out"
    assert set(seen.values()) == {1}


def test_the_order_is_a_function_of_seed_and_epoch(train: Path) -> None:
    def order(seed: int, epoch: int) -> list[str]:
        return queries(TripleBatches(TripleSet(str(train)), 1, 2, seed, epoch=epoch))

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(one) == sorted(row["query"] for row in ROWS) for one in orders)


def test_the_epoch_is_read_when_the_pass_begins(train: Path) -> None:
    batches = TripleBatches(TripleSet(str(train)), 1, 2)
    first = queries(batches)
    batches.epoch = 1
    assert queries(batches) == queries(TripleBatches(TripleSet(str(train)), 1, 2, epoch=1)) != first


@pytest.mark.parametrize("streamed", [False, True])
def test_start_gives_the_rest_of_the_epoch(train: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    triples = streamed_set(monkeypatch) if streamed else TripleSet(str(train))
    whole = list(TripleBatches(triples, 4, 2))
    assert list(TripleBatches(triples, 4, 2, start=2)) == whole[2:]
    # a later run with other ranks continues the same global batches
    halves = [list(TripleBatches(triples, 4, 2, rank=rank, world_size=2, start=3)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole[3:]


def streamed_set(monkeypatch: pytest.MonkeyPatch, n_rows: int | None = None, **settings) -> TripleSet:
    from datasets import Dataset

    triples = TripleSet("a/b", **settings)
    stream = HubStream(
        Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3), Columns(), "a/b", n_rows=n_rows, shuffle_buffer=7
    )
    monkeypatch.setattr(TripleSet, "open", lambda self: stream)
    return triples


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_is_shared_by_ranks_without_overlap(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    triples = streamed_set(monkeypatch)
    whole = list(TripleBatches(triples, 4, 2, seed=1, epoch=2))
    parts = [
        list(DataLoader(TripleBatches(triples, 4, 2, 1, rank, 2, 2), None, num_workers=workers, collate_fn=list))
        for rank in range(2)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert len(set(queries(whole))) == 20
    assert queries(whole) != queries(TripleBatches(triples, 4, 2, seed=1, epoch=3))


def test_the_length_of_a_stream_is_known_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="does not say how many rows"):
        len(TripleBatches(streamed_set(monkeypatch), 4, 2))
    assert len(TripleBatches(streamed_set(monkeypatch, n_rows=23), 4, 2)) == 5
    limited = TripleBatches(streamed_set(monkeypatch, n_rows=23, max_rows=9), 4, 2)
    assert len(limited) == len(list(limited)) == 2
    assert set(queries(limited)) < {f"query {i}" for i in range(9)}


def test_max_rows_takes_the_first(train: Path) -> None:
    batches = TripleBatches(TripleSet(str(train), max_rows=6), 3, 2)
    assert len(batches) == 2
    assert sorted(queries(batches)) == [f"query {i}" for i in range(6)]


def test_impossible_batches_are_refused(train: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 23 rows, fewer than one batch: set data\.batch_size to 23 or less"):
        TripleBatches(TripleSet(str(train)), 24, 2)
    with pytest.raises(ValueError, match=r"data\.batch_size is 6, .* multiple of the 4 ranks"):
        TripleBatches(TripleSet(str(train)), 6, 2, world_size=4)


def test_instruction_and_switch_of_the_set_reach_the_triples(train: Path) -> None:
    batches = TripleBatches(TripleSet(str(train), instruction="Find", in_batch_negatives=False), 4, 2)
    triple = next(iter(batches))[0]
    assert (triple.instruction, triple.in_batch_negatives) == ("Find", False)


# real rows


@pytest.mark.parametrize(("name", "n"), [("msmarco/train.jsonl.gz", 5480), ("msmarco_hard/train.jsonl", 178)])
def test_real_rows(shared_data: Path, name: str, n: int) -> None:
    batches = TripleBatches(TripleSet(str(shared_data / name)), 16, 8)
    assert batches.n_rows == n
    sizes = np.array([len(triple.negatives) for batch in batches for triple in batch])
    assert len(sizes) == n // 16 * 16
    assert sizes.max() == 8
    assert (sizes.min() < 8) == (name == "msmarco_hard/train.jsonl"), "the hard set is ragged"
    assert isinstance(batches.rows, JsonLines)

"""BM25 against its formula; mined negatives never hold a positive."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ullme.data.beir import read_beir
from ullme.data.mining import BM25, mine_negatives, word_key

CRANFIELD = Path(__file__).parents[2] / "shared" / "data" / "cranfield"
TEXTS = ["the graph of a tree", "Tree, tree and tree.", "matrix rows", "a shortest path in the graph"]


def test_scores_are_the_formula():
    k1, b = 0.9, 0.4
    _, scores = BM25(TEXTS, k1, b).search(["graph tree"], k=len(TEXTS))
    documents = [word_key(text).split() for text in TEXTS]
    mean = np.mean([len(words) for words in documents])

    def expected(words):
        total = 0.0
        for word in ("graph", "tree"):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            tf = words.count(word)
            total += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        return total

    np.testing.assert_allclose(scores[0], sorted(map(expected, documents), reverse=True), rtol=1e-5)


def test_search_ranks_each_query_on_its_own():
    index = BM25(TEXTS)
    indices, scores = index.search(["shortest path", "matrix", "no such word", ""], k=2)
    assert indices.shape == scores.shape == (4, 2)
    assert indices[:2, 0].tolist() == [3, 2]
    assert (scores[2:] == 0).all()
    alone, _ = index.search(["matrix"], k=2)
    assert alone[0, 0] == 2
    assert index.search([], k=2)[0].shape == (0, 2)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one text"):
        BM25([])
    with pytest.raises(ValueError, match="between 1 and the 4"):
        BM25(TEXTS).search(["graph"], k=5)


def test_negatives_hold_no_positive_no_duplicate_and_no_stranger():
    corpus = ["a graph tree", "A  graph: tree!", "graph tree path", "GRAPH TREE PATH", "graph nodes", "matrix rows"]
    queries, positives = ["graph tree", "graph tree", "matrix"], [["a graph tree"], ["graph nodes"], ["matrix rows"]]
    mined = mine_negatives(queries, positives, corpus, n=8)
    for row, relevant in zip(mined, positives, strict=True):
        keys = [word_key(text) for text in row]
        assert len(set(keys)) == len(keys)
        assert not set(keys) & {word_key(text) for text in relevant}
    assert [word_key(text) for text in mined[0]] == ["graph tree path", "graph nodes"]
    assert mined[2] == []  # no other passage shares a word with the query: the row is shorter, never padded


def test_every_known_positive_is_left_out_and_n_is_kept():
    corpus = [f"graph number {i}" for i in range(20)]
    [row] = mine_negatives(["graph number"], [corpus[:5]], corpus, n=3)
    assert len(row) == 3
    assert not set(row) & set(corpus[:5])
    with pytest.raises(ValueError, match="1 for 2 queries"):
        mine_negatives(["a", "b"], [["x"]], corpus)


@pytest.mark.skipif(not CRANFIELD.exists(), reason="needs ../shared/data/cranfield")
def test_cranfield():
    """nDCG@10 of a plain BM25 with these settings is 0.343 by the collection's README; words differ a little."""
    collection = read_beir(CRANFIELD)
    ids = list(collection.corpus)
    indices, _ = BM25(list(collection.corpus.values())).search(list(collection.queries.values()), k=10)
    discounts = 1 / np.log2(np.arange(2, 12))
    found = []
    for query, row in zip(collection.queries, indices, strict=True):
        grades = collection.qrels[query]
        gains = np.array([grades.get(ids[i], 0) for i in row])
        ideal = np.sort([*grades.values(), *[0] * 10])[::-1][:10]
        found.append((gains @ discounts) / (ideal @ discounts))
    assert np.mean(found) == pytest.approx(0.343, abs=0.015)

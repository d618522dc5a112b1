"""Ranking and its metrics, against hand-made numbers and against mteb.

- ``rank`` is the plain sort of the inner products, whatever the block sizes.
- nDCG@10, MRR@10 and Recall@100 equal their closed forms; negative cosines count; ties fall as in trec_eval.
- The same embeddings get the same scores from us and from mteb's own loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.models.abs_encoder import AbsEncoder

from ullme.data.beir import Collection, read_beir
from ullme.eval import retrieval
from ullme.eval.encoder import local_meta
from ullme.eval.lexical import BM25Searcher
from ullme.eval.retrieval import embed, evaluate_collection, rank, retrieval_metrics, search
from ullme.eval.tasks import CollectionTask


class TableEmbedder(AbsEncoder):
    """Looks every text up in a table: for us (``encode(texts, kind)``) and for mteb (``encode(batches, ...)``)."""

    mteb_model_meta = local_meta("test/table", "1", {}, embed_dim=8)

    def __init__(self, table: dict[str, np.ndarray]) -> None:
        self.table = table
        self.seen: list[str] = []

    def encode(self, inputs: Any, kind: str | None = None, **kwargs: Any) -> np.ndarray:
        texts = inputs if kind else [text for batch in inputs for text in batch["text"]]
        self.seen += texts
        rows = [self.table[text] for text in texts]
        return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 8), np.float32)


def random_collection(queries: int = 30, passages: int = 400) -> tuple[Collection, TableEmbedder]:
    """Random unit vectors, three graded judgements a query."""
    rng = np.random.default_rng(0)
    corpus = {f"p{i}": f"passage {i}" for i in range(passages)}
    asked = {f"q{i}": f"query {i}" for i in range(queries)}
    vectors = rng.standard_normal((len(corpus) + len(asked), 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = dict(zip([*corpus.values(), *asked.values()], vectors, strict=True))
    qrels = {q: dict(zip([f"p{i}" for i in rng.choice(passages, 3, False)], (1, 2, 0), strict=True)) for q in asked}
    return Collection("random", corpus, asked, qrels), TableEmbedder(table)


@pytest.mark.parametrize(("query_block", "corpus_block", "k"), [(1024, 16_384, 5), (3, 7, 5), (1, 1, 40), (2, 9, 200)])
def test_rank_is_the_plain_sort(monkeypatch: pytest.MonkeyPatch, query_block: int, corpus_block: int, k: int) -> None:
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", query_block)
    monkeypatch.setattr(retrieval, "CORPUS_BLOCK", corpus_block)
    rng = np.random.default_rng(1)
    queries, corpus = rng.standard_normal((11, 4)).astype("f4"), rng.standard_normal((53, 4)).astype("f4")
    expected = np.argsort(-(queries @ corpus.T), axis=1)[:, :k]
    for given in (corpus, iter([corpus[:20], corpus[20:21], corpus[21:]])):
        indices, scores = rank(queries, given, k)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ corpus.T, expected, 1), rtol=1e-5, atol=1e-6)


def test_rank_without_queries_and_with_a_senseless_k() -> None:
    indices, scores = rank(np.zeros((0, 4), "f4"), np.ones((3, 4), "f4"), 2)
    assert indices.shape == scores.shape == (0, 2)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        rank(np.ones((1, 4), "f4"), np.ones((3, 4), "f4"), 0)


def test_metrics_equal_their_closed_forms() -> None:
    qrels = {"graded": {"a": 2, "c": 1, "z": 0}, "late": {"p11": 1}, "absent": {"x": 1}}
    run = {
        "graded": {"b": 0.3, "a": 0.2, "c": 0.1},  # grades 0, 2, 1
        "late": {f"p{i:02d}": -float(i) for i in range(1, 13)},  # relevant at rank 11, every score negative
    }
    ideal = 2 + 1 / log2(3)
    got = retrieval_metrics(run, qrels)
    assert got["ndcg@10"] == pytest.approx((2 / log2(3) + 1 / log2(4)) / ideal / 3)
    assert got["mrr@10"] == pytest.approx((1 / 2) / 3)
    assert got["recall@100"] == pytest.approx((1 + 1 + 0) / 3)


def test_equal_scores_fall_as_in_trec_eval() -> None:
    run = {"q": {"a": 1.0, "b": 1.0}}
    assert retrieval_metrics(run, {"q": {"b": 1}})["mrr@10"] == 1.0  # the larger id comes first
    assert retrieval_metrics(run, {"q": {"a": 1}})["mrr@10"] == 0.5


def test_hand_made_collection() -> None:
    """Angles in the plane: q0 finds its passage first, q1 third, q2 has no relevant passage and does not count."""
    at = {"q0": 0, "q1": 90, "q2": 45, "a": 5, "b": 80, "c": 100, "d": 130, "e": 270}
    vectors = {name: np.array([np.cos(np.radians(t)), np.sin(np.radians(t))]) for name, t in at.items()}
    texts = {name: f"text {name}" for name in at}
    collection = Collection(
        "plane",
        corpus={name: texts[name] for name in "abcde"},
        queries={name: texts[name] for name in ("q0", "q1", "q2")},
        qrels={"q0": {"a": 1}, "q1": {"d": 1}, "q2": {"a": 0}},
    )
    model = TableEmbedder({texts[name]: vector for name, vector in vectors.items()})
    expected = {"ndcg@10": (1 + 1 / log2(4)) / 2, "mrr@10": (1 + 1 / 3) / 2, "recall@100": 1.0}
    assert evaluate_collection(model, collection) == pytest.approx(expected)
    assert [hit.id for hit in search(model, collection.corpus, [texts["q0"]], k=2)[0]] == ["a", "b"]

    collection.qrels = {"q2": {"a": 0}}
    with pytest.raises(ValueError, match="plane: no query has a relevant passage"):
        evaluate_collection(model, collection)


def test_metrics_equal_mtebs() -> None:
    collection, model = random_collection()
    ours = evaluate_collection(model, collection)
    result = mteb.evaluate(model, CollectionTask(collection), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    # mteb rounds nDCG and recall to five digits
    assert scores["ndcg_at_10"] == scores["main_score"] == pytest.approx(round(ours["ndcg@10"], 5), abs=1e-6)
    assert scores["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-6)
    assert scores["recall_at_100"] == pytest.approx(round(ours["recall@100"], 5), abs=1e-6)
    assert 0 < ours["ndcg@10"] < 1


def test_embed_reads_each_text_once_and_an_empty_one_never() -> None:
    model = TableEmbedder({"a": np.eye(8)[0], "b": np.eye(8)[1]})
    embeddings = embed(model, ["b", "", "a", "b", "  "], "passage")
    np.testing.assert_array_equal(
        embeddings, np.stack([np.eye(8)[1], np.zeros(8), np.eye(8)[0], np.eye(8)[1], np.zeros(8)])
    )
    assert sorted(model.seen) == ["a", "b"]


def test_bm25_finds_words_and_only_words() -> None:
    corpus = {"fox": "the quick brown fox", "hen": "a hen in the barn", "cat": "the cat sleeps"}
    hits = search(BM25Searcher(), corpus, ["where is the hen", "zebra"], k=3)
    assert hits[0][0].id == "hen"
    assert hits[1] == []
    collection = Collection("farm", corpus, {"1": "hen", "2": "zebra"}, {"1": {"hen": 1}, "2": {"cat": 1}})
    assert evaluate_collection(BM25Searcher(), collection) == {"ndcg@10": 0.5, "mrr@10": 0.5, "recall@100": 0.5}


@pytest.mark.parametrize(("name", "split", "ndcg"), [("cranfield", None, 0.343), ("nfcorpus", "dev", 0.269)])
def test_bm25_on_real_text(shared_data: Path, name: str, split: str | None, ndcg: float) -> None:
    """Near the figures of the data's own READMEs, whose tokenizer is not ours; and through mteb the same."""
    collection = read_beir(shared_data / name, split)
    ours = evaluate_collection(BM25Searcher(), collection)
    assert ours["ndcg@10"] == pytest.approx(ndcg, abs=0.02)
    result = mteb.evaluate(BM25Searcher(), CollectionTask(collection), cache=None, show_progress_bar=False)
    scores: Sequence[Any] = result.task_results[0].scores["test"]
    assert scores[0]["ndcg_at_10"] == pytest.approx(round(ours["ndcg@10"], 5), abs=1e-6)

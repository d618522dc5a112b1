"""Dense retrieval without a benchmark around it: rank a corpus, score the ranking, show the passages.

A passage's relevance is the inner product of L2-normalised embeddings, s(q, p) = cos(e(q), e(p)). The corpus is
embedded and ranked a block at a time, so memory grows with the queries and k, never with the corpus. The metrics are
trec_eval's (pytrec_eval), as mteb's are: equal scores give equal figures.

Q queries, C passages, D width.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ullme.data.beir import Collection

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]

DEPTH = 100
QUERY_BLOCK = 1024
CORPUS_BLOCK = 16_384


class Embedder(Protocol):
    """What ``ULLME`` offers: float32 [n, D], L2-normalised unless asked otherwise."""

    def encode(self, texts: Sequence[str], kind: str = "passage", **kwargs: Any) -> np.ndarray: ...


@runtime_checkable
class Searcher(Protocol):
    """A model that ranks texts without embedding them, such as BM25; a passage it did not find scores -inf."""

    def rank(self, queries: Sequence[str], passages: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]: ...


class Hit(NamedTuple):
    id: str
    score: float
    text: str


def embed(model: Embedder, texts: Sequence[str], kind: str, **kwargs: Any) -> np.ndarray:
    """float32 [n, D]: each distinct text once; a text without a word, which public corpora hold, is a zero vector."""
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    row = {text: i for i, text in enumerate(distinct)}
    embeddings = np.asarray(model.encode(distinct, kind=kind, **kwargs), dtype=np.float32)
    if len(distinct) == len(texts):
        return embeddings
    padded = np.concatenate([embeddings, np.zeros((1, embeddings.shape[1]), dtype=np.float32)])
    return padded[[row.get(text, len(distinct)) for text in texts]]


def rank(
    query_embeddings: np.ndarray, corpus_embeddings: np.ndarray | Iterable[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k passages of largest inner product with each query, best first.

    query_embeddings: float32 [Q, D]. corpus_embeddings: float32 [C, D], or blocks [c, D] in corpus order.
    Returns indices int64 [Q, min(k, C)] into the corpus and scores float32 of the same shape.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    queries = torch.from_numpy(np.ascontiguousarray(query_embeddings, dtype=np.float32))
    blocks = [corpus_embeddings] if isinstance(corpus_embeddings, np.ndarray) else corpus_embeddings
    scores, indices = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    start = 0
    for block in blocks:
        passages = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
        for chunk in passages.split(CORPUS_BLOCK):
            scores, indices = _merge(queries, chunk, start, scores, indices, k)
            start += len(chunk)
    return indices.numpy(), scores.numpy()


def _merge(
    queries: Tensor, passages: Tensor, start: int, scores: Tensor, indices: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The best k of those found so far and of ``passages``, whose first index is ``start``."""
    rows: list[tuple[Tensor, Tensor]] = []
    for i in range(0, max(len(queries), 1), QUERY_BLOCK):
        span = slice(i, i + QUERY_BLOCK)
        found, where = (queries[span] @ passages.T).topk(min(k, len(passages)), dim=1)
        best = torch.cat([scores[span], found], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows.append((best, torch.cat([indices[span], where + start], dim=1).gather(1, order)))
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def retrieve(
    model: Embedder | Searcher,
    queries: Sequence[str],
    passages: Sequence[str],
    k: int,
    block: int = 50_000,
    **kwargs: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """``rank`` for texts: indices int64 [Q, min(k, C)] into ``passages`` and their scores.

    block: passages embedded at a time; memory only. kwargs: for the model's ``encode``.
    """
    if isinstance(model, Searcher):
        return model.rank(queries, passages, k)

    def embedded() -> Iterator[np.ndarray]:
        for start in range(0, len(passages), block):
            yield embed(model, passages[start : start + block], "passage", **kwargs)

    return rank(embed(model, queries, "query", **kwargs), embedded(), k)


def judged_queries(collection: Collection) -> dict[str, str]:
    """The queries that have a relevant passage: the others can tell no ranking from another."""
    return {
        key: text
        for key, text in collection.queries.items()
        if any(grade > 0 for grade in collection.qrels.get(key, {}).values())
    }


def retrieval_metrics(run: Run, qrels: Qrels) -> dict[str, float]:
    """nDCG@10 (graded), MRR@10 and Recall@100, each in [0, 1], the mean over the queries of ``qrels``.

    run: query id -> passage id -> score. A judged query without a ranking counts 0. Ties fall as in trec_eval: the
    larger passage id first.
    """
    import pytrec_eval

    if not qrels:
        raise ValueError("no query has a relevance judgement: nothing to score")
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"})
    scores = evaluator.evaluate({key: dict(run[key]) for key in qrels if key in run}).values()
    first_ten = {
        key: dict(heapq.nlargest(10, run[key].items(), key=lambda hit: (hit[1], hit[0]))) for key in qrels if key in run
    }
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten).values()
    return {
        "ndcg@10": sum(score["ndcg_cut_10"] for score in scores) / len(qrels),
        "mrr@10": sum(score["recip_rank"] for score in reciprocal) / len(qrels),
        "recall@100": sum(score["recall_100"] for score in scores) / len(qrels),
    }


def evaluate_collection(model: Embedder | Searcher, collection: Collection, **kwargs: Any) -> dict[str, float]:
    """``retrieval_metrics`` of a model that ranks the whole corpus for every judged query.

    kwargs: for the model's ``encode``.
    """
    queries = judged_queries(collection)
    if not queries:
        raise ValueError(f"{collection.name}: no query has a relevant passage, so nothing can be scored")
    ids = list(collection.corpus)
    indices, scores = retrieve(model, list(queries.values()), list(collection.corpus.values()), DEPTH, **kwargs)
    run = {
        query: {ids[i]: float(score) for i, score in zip(found, row, strict=True) if score > -np.inf}
        for query, found, row in zip(queries, indices, scores, strict=True)
    }
    return retrieval_metrics(run, {query: collection.qrels[query] for query in queries})


def search(
    model: Embedder | Searcher, corpus: Mapping[str, str], queries: Sequence[str], k: int = 5, **kwargs: Any
) -> list[list[Hit]]:
    """The k best passages of ``corpus`` (id -> text) for each query, best first."""
    ids, texts = list(corpus), list(corpus.values())
    indices, scores = retrieve(model, queries, texts, k, **kwargs)
    return [
        [Hit(ids[i], float(score), texts[i]) for i, score in zip(found, row, strict=True) if score > -np.inf]
        for found, row in zip(indices, scores, strict=True)
    ]

"""BM25 beside the embedders: the same tasks, the same metrics, no weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ullme.data import mining
from ullme.eval.fingerprint import digest

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.models import ModelMeta


class BM25Searcher:
    """``rank`` for our own retrieval, ``index`` and ``search`` for mteb's."""

    def __init__(self) -> None:
        self._corpus: Dataset | None = None

    def rank(self, queries: Sequence[str], passages: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices int64 [Q, min(k, C)] into ``passages``, best first, and BM25 scores float32.

        A passage that shares no word with the query is not found: its score is -inf.
        """
        indices, scores = mining.BM25(passages).search(queries, min(k, len(passages)))
        return indices, np.where(scores > 0, scores, -np.inf)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        from mteb.models import ModelMeta

        revision = digest([version("bm25s"), inspect.getsource(mining)])
        return ModelMeta.create_empty({"name": "ullme/bm25", "revision": revision, "model_type": ["sparse"]})

    def index(self, corpus: Dataset, **kwargs: Any) -> None:
        self._corpus = corpus

    def search(self, queries: Dataset, *, top_k: int, top_ranked: Any = None, **kwargs: Any) -> Any:
        """mteb's form of a ranking: query id -> passage id -> score."""
        assert self._corpus is not None, "mteb indexes before it searches"
        if top_ranked is not None:
            raise ValueError("bm25 ranks a whole corpus; reranking tasks need an embedder")
        titles = self._corpus["title"] if "title" in self._corpus.column_names else [""] * len(self._corpus)
        texts = [f"{title} {text}".strip() for title, text in zip(titles, self._corpus["text"], strict=True)]
        indices, scores = self.rank(list(queries["text"]), texts, top_k)
        ids = list(self._corpus["id"])
        return {
            query: {ids[i]: float(score) for i, score in zip(found, row, strict=True) if score > -np.inf}
            for query, found, row in zip(queries["id"], indices, scores, strict=True)
        }

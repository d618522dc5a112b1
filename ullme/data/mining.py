"""BM25 (Robertson & Zaragoza 2009), and hard negatives mined with it.

    score(q, d) = sum over words w of q:  idf(w) tf(w, d) / (tf(w, d) + k1 (1 - b + b |d| / mean |d|))

A hard negative of a query is a passage that BM25 ranks high for it and that is not relevant. Invariant: no negative
has the same words as a known positive of its query, nor as another negative of the same row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from tqdm.auto import tqdm

WORD = r"(?u)\b\w+\b"


def word_key(text: str) -> str:
    """Lower-case words, one space between them: texts with the same key count as duplicates."""
    return " ".join(re.findall(WORD, text.lower()))


class BM25:
    """An index over texts; neither stop words nor stemming. k1 and b as Anserini sets them for MS MARCO-like text."""

    def __init__(self, texts: Sequence[str], k1: float = 0.9, b: float = 0.4):
        import bm25s

        if not texts:
            raise ValueError("BM25 needs at least one text to index, got none")
        self._size = len(texts)
        self._tokenize = partial(bm25s.tokenize, stopwords=None, token_pattern=WORD, show_progress=False)
        self._index = bm25s.BM25(k1=k1, b=b)
        self._index.index(self._tokenize(list(texts)), show_progress=False)

    def search(self, queries: Sequence[str], k: int, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The k best texts of each query, best first: indices int64 [Q, k] and scores float32 [Q, k].

        k must not exceed the number of texts. A text that shares no word with the query scores 0.
        """
        if not 1 <= k <= self._size:
            raise ValueError(f"k must be between 1 and the {self._size} indexed texts, got {k}")
        if not queries:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        words = self._tokenize(list(queries), return_ids=False)
        indices = np.empty((len(queries), k), np.int64)
        scores = np.empty((len(queries), k), np.float32)
        step = 512
        for start in tqdm(range(0, len(words), step), desc="BM25", unit_scale=step, disable=not progress):
            rows = slice(start, start + step)
            indices[rows], scores[rows] = self._index.retrieve(words[rows], k=k, show_progress=False)
        return indices, scores


def mine_negatives(
    queries: Sequence[str],
    positives: Sequence[Sequence[str]],
    corpus: Sequence[str],
    n: int = 8,
    depth: int = 32,
    progress: bool = False,
) -> list[list[str]]:
    """Up to ``n`` hard negatives for each query, hardest first.

    positives: the known positives of each query; a passage with the words of one of them is never a negative.
    depth: how many of BM25's best passages are looked at. A row is shorter where fewer than ``n`` of them can serve.
    """
    if len(queries) != len(positives):
        raise ValueError(f"expected one list of positives a query, got {len(positives)} for {len(queries)} queries")
    keys = [word_key(text) for text in corpus]
    indices, scores = BM25(corpus).search(queries, min(depth, len(corpus)), progress)
    mined = []
    for row, row_scores, relevant in zip(indices.tolist(), scores.tolist(), positives, strict=True):
        taken = {word_key(text) for text in relevant}
        negatives: list[str] = []
        for i, score in zip(row, row_scores, strict=True):
            if len(negatives) == n or score <= 0:
                break
            if keys[i] not in taken:
                taken.add(keys[i])
                negatives.append(corpus[i])
        mined.append(negatives)
    return mined

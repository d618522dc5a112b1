"""Contrastive learning (section 3.2.2; InfoNCE with in-batch and hard negatives, van den Oord et al. 2018).

    s_rt(q, p) = cos(e(q), e(p))
    L_CL = -log exp(s_rt(q, p+)/tau) / sum_{p in candidates} exp(s_rt(q, p)/tau)

Invariant: a passage whose text equals a positive of the query is never its negative, wherever it stands in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, LossInputs


def cosine_scores(query_reps: Tensor, passage_reps: Tensor) -> Tensor:
    """s_rt of every query with every passage, in fp32. [B, D], [C, N, D] -> [B, C, N]."""
    if query_reps.ndim != 2 or passage_reps.ndim != 3 or query_reps.shape[-1] != passage_reps.shape[-1]:
        raise ValueError(
            "expected query_reps [B, D] and passage_reps [C, N, D] of one width D, got "
            f"{list(query_reps.shape)} and {list(passage_reps.shape)}"
        )
    queries = F.normalize(query_reps.float(), dim=-1)
    passages = F.normalize(passage_reps.float(), dim=-1)
    return torch.einsum("bd,cnd->bcn", queries, passages)


def candidate_mask(
    query_hash: Tensor,
    positive_hash: Tensor,
    all_query_hash: Tensor,
    all_passage_hash: Tensor,
    positives: Tensor,
    in_batch: Tensor | None = None,
) -> Tensor:
    """Which cells take part in a query's contrast: its positive, and every passage that is not a duplicate of one.

    query_hash int64 [B], positive_hash int64 [B, P] (all positives of the row, 0 padded), all_query_hash int64 [C],
    all_passage_hash int64 [C, N] (0 where the cell is empty), positives int64 [B] (the query's own row among the C),
    in_batch bool [B] (False: only the query's own negatives). Returns bool [B, C, N].

    A duplicate is a passage with the text of any positive of the query, or the positive of a query with the same text.
    """
    exists = all_passage_hash != 0
    duplicate = torch.zeros(len(query_hash), *all_passage_hash.shape, dtype=torch.bool, device=query_hash.device)
    for column in positive_hash.unbind(1):
        duplicate |= (all_passage_hash[None] == column[:, None, None]) & (column != 0)[:, None, None]
    duplicate[:, :, 0] |= query_hash[:, None] == all_query_hash[None]
    mask = exists[None] & ~duplicate
    rows = torch.arange(len(query_hash), device=query_hash.device)
    if in_batch is not None:
        own = torch.zeros_like(mask)
        own[rows, positives] = True
        mask &= own | in_batch[:, None, None]
    mask[rows, positives, 0] = True
    return mask


def ntxent(
    scores: Tensor, positives: Tensor, candidates: Tensor, temperature: float, margin: float | None = None
) -> Tensor:
    """InfoNCE of each query.

    scores [B, C, N], positives int64 [B], candidates bool [B, C, N]; ``margin``: negatives that score above the
    positive by more than it are left out as probable false negatives. Returns [B].
    """
    if scores.shape != candidates.shape:
        raise ValueError(f"scores {list(scores.shape)} and candidates {list(candidates.shape)} must agree")
    rows = torch.arange(len(scores), device=scores.device)
    if not bool(candidates[rows, positives, 0].all()):
        raise ValueError("every query's positive must be among its candidates")
    positive = scores[rows, positives, 0]
    if margin is not None:
        candidates = candidates & (scores.detach() <= positive.detach()[:, None, None] + margin)
    logits = (scores / temperature).masked_fill(~candidates, float("-inf"))
    return logits.flatten(1).logsumexp(-1) - positive / temperature


@dataclass
class NTXentLoss(Loss):
    """L_CL with cosine scores.

    temperature: tau; the paper writes none (tau = 1), in practice 0.01 to 0.05.
    in_batch_negatives: False contrasts a query with its own hard negatives only.
    margin: leave out negatives that score above the positive by more than this (cosine units); null keeps all.
    """

    temperature: float = 0.05
    in_batch_negatives: bool = True
    margin: float | None = None

    reads: ClassVar[frozenset[str]] = frozenset({"query_reps", "passage_reps", "candidates"})
    over_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"NTXentLoss: temperature must be positive, got {self.temperature}")

    def __call__(self, inputs: LossInputs) -> Tensor:
        candidates = inputs.get("candidates", "B", "C", "N")
        positives = inputs.get("positives", "B")
        scores = cosine_scores(inputs.get("query_reps", "B", "D"), inputs.get("passage_reps", "C", "N", "D"))
        if not self.in_batch_negatives:
            own = torch.zeros_like(candidates)
            own[torch.arange(len(own), device=own.device), positives] = True
            candidates = candidates & own
        return ntxent(scores, positives, candidates, self.temperature, self.margin)

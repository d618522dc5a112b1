"""Generation-guided representation learning: the two relevances agree (section 3.2.2).

    P_rt  = softmax over U of s_rt(q, p) / tau_rt,   s_rt the cosine of the embeddings
    P_gen = softmax over U of s_gen(q, p) / tau_gen, s_gen the mean log-likelihood of p's tokens
    L_KL  = sum_{p in U} P_rt log(P_rt / P_gen) = KL(P_rt || P_gen)

The paper writes tau = 1 and lets gradients flow into both sides: those are the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, LossInputs
from .generation import mean_logps


def kl_alignment(
    rt_scores: Tensor, gen_scores: Tensor, mask: Tensor, tau_rt: float = 1.0, tau_gen: float = 1.0
) -> Tensor:
    """KL(P_rt || P_gen) over each query's candidates, in nats. rt_scores, gen_scores, mask [B, N] -> [B]."""
    if rt_scores.shape != gen_scores.shape or rt_scores.shape != mask.shape:
        raise ValueError(
            f"rt_scores {list(rt_scores.shape)}, gen_scores {list(gen_scores.shape)} and mask {list(mask.shape)} "
            "must agree"
        )
    log_rt = F.log_softmax((rt_scores / tau_rt).masked_fill(~mask, float("-inf")), dim=-1)
    log_gen = F.log_softmax((gen_scores / tau_gen).masked_fill(~mask, float("-inf")), dim=-1)
    log_rt, log_gen = log_rt.masked_fill(~mask, 0.0), log_gen.masked_fill(~mask, 0.0)
    return (torch.where(mask, log_rt.exp(), 0.0) * (log_rt - log_gen)).sum(-1)


@dataclass
class KLLoss(Loss):
    """L_KL in the paper's direction.

    temperature_rt: tau of P_rt (cosines lie in [-1, 1]; 1 as the paper writes makes P_rt nearly flat).
    temperature_gen: tau of P_gen (nats a token).
    stop_gradient: "rt" holds the embeddings still, "gen" the generator, "none" (the paper) neither.
    """

    temperature_rt: float = 1.0
    temperature_gen: float = 1.0
    stop_gradient: Literal["none", "rt", "gen"] = "none"

    reads: ClassVar[frozenset[str]] = frozenset({"query_reps", "passage_reps", "logps", "lengths"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature_rt > 0 and self.temperature_gen > 0):
            raise ValueError(
                f"KLLoss: temperatures must be positive, got {self.temperature_rt} and {self.temperature_gen}"
            )

    def __call__(self, inputs: LossInputs) -> Tensor:
        queries = F.normalize(inputs.get("query_reps", "B", "D").float(), dim=-1)
        passages = F.normalize(inputs.get("passage_reps", "B", "N", "D").float(), dim=-1)
        s_rt = torch.einsum("bd,bnd->bn", queries, passages)
        s_gen = mean_logps(inputs.get("logps", "B", "N"), inputs.get("lengths", "B", "N"), inputs.mask)
        if self.stop_gradient == "rt":
            s_rt = s_rt.detach()
        elif self.stop_gradient == "gen":
            s_gen = s_gen.detach()
        return kl_alignment(s_rt, s_gen, inputs.mask, self.temperature_rt, self.temperature_gen)

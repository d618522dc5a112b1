"""Supervised fine-tuning: make the model write the positive passage (section 3.2.2).

    L_SFT = -(1/t) sum_i log pi_theta(w_i | w_<i, q),  w_1 .. w_t the tokens of p+

Only tokens of the passage count; the prompt is never part of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Loss, LossInputs


def mean_logps(logps: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """s_gen(q, p) = log pi(p|q) / t; all [B, N]. A cell that holds a passage of no tokens is an error."""
    if logps.shape != lengths.shape or logps.shape != mask.shape:
        raise ValueError(
            f"logps {list(logps.shape)}, lengths {list(lengths.shape)} and mask {list(mask.shape)} must agree"
        )
    if bool((mask & (lengths < 1)).any()):
        raise ValueError("a passage without tokens has no generation score: its response mask is empty")
    return torch.where(mask, logps, 0.0) / lengths.clamp(min=1)


def sft(logps: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """-s_gen(q, p+) of each query. logps, lengths, mask [B, N] -> [B]."""
    return -mean_logps(logps[:, :1], lengths[:, :1], mask[:, :1])[:, 0]


@dataclass
class SFTLoss(Loss):
    """L_SFT: the mean negative log-likelihood of the positive passage, in nats a token."""

    reads: ClassVar[frozenset[str]] = frozenset({"logps", "lengths"})

    def __call__(self, inputs: LossInputs) -> Tensor:
        return sft(inputs.get("logps", "B", "N"), inputs.get("lengths", "B", "N"), inputs.mask)

"""Direct preference optimisation: the positive passage over each negative (section 3.2.2; Rafailov et al. 2023, eq. 7).

    L_DPO = -log sigma( beta log pi_theta(p+|q)/pi_ref(p+|q) - beta log pi_theta(p-|q)/pi_ref(p-|q) ), mean over p-

Log-likelihoods are sums over the passage's tokens. pi_ref is the model with its adapter off, so the margin is
exactly 0 and the loss log 2 before the first update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import Loss, LossInputs, masked_mean


def preference_margins(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log-ratio of the positive less that of each negative. logps, ref_logps [B, N] -> [B, N - 1]."""
    if logps.shape != ref_logps.shape or logps.ndim != 2 or logps.shape[1] < 2:
        raise ValueError(
            "preference losses need logps and ref_logps [B, N] with a positive and at least one negative, got "
            f"{list(logps.shape)} and {list(ref_logps.shape)}: set data.negatives to 1 or more"
        )
    ratios = logps - ref_logps
    return ratios[:, :1] - ratios[:, 1:]


def dpo(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """L_DPO of each query, mean over the negatives it has. logps, ref_logps, mask [B, N] -> [B]."""
    return masked_mean(-F.logsigmoid(beta * preference_margins(logps, ref_logps)), mask[:, 1:])


@dataclass
class DPOLoss(Loss):
    """L_DPO with a true reference.

    beta: strength of the pull towards the reference (the paper's 0.1).
    """

    beta: float = 0.1

    reads: ClassVar[frozenset[str]] = frozenset({"logps", "ref_logps"})

    def __call__(self, inputs: LossInputs) -> Tensor:
        return dpo(inputs.get("logps", "B", "N"), inputs.get("ref_logps", "B", "N"), inputs.mask, self.beta)

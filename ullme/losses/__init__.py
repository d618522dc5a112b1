"""The objective as a list of terms with weights; each term is one idea in one file.

    L = sum_k weight_k L_k        GRL: L_CL + 0.5 L_DPO + L_KL (section 3.2.2)

A new loss is a new file and a line in ``Losses``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .alignment import KLLoss, kl_alignment
from .base import Loss, LossInputs, active
from .contrastive import NTXentLoss, candidate_mask, cosine_scores, ntxent
from .generation import SFTLoss, mean_logps, sft
from .preference import DPOLoss, dpo, preference_margins


@dataclass
class Losses:
    """Terms of the objective; null leaves one out.

    contrastive: L_CL over the embeddings of the whole batch.
    sft: L_SFT on the positive passage.
    dpo: L_DPO of the positive over each hard negative.
    kl: L_KL between embedding and generation relevance.
    """

    contrastive: NTXentLoss | None = field(default_factory=NTXentLoss)
    sft: SFTLoss | None = None
    dpo: DPOLoss | None = None
    kl: KLLoss | None = None

    def __post_init__(self) -> None:
        if not any(True for _ in active(self)):
            raise ValueError(f"model.losses holds no term: set at least one of {', '.join(vars(self))}")

    @property
    def reads(self) -> frozenset[str]:
        """Names of the tensors that some active loss reads."""
        return frozenset().union(*(loss.reads for _, loss in active(self)))

    @classmethod
    def from_names(cls, con_loss_type: str | None, gen_loss_type: str | None, use_kl_loss: bool) -> Losses:
        """The paper's listing 2: 'NTXentLoss' or None, 'sft', 'dpo' or None, and L_KL; weights as in section 4."""
        contrastive: dict[str | None, NTXentLoss | None] = {"NTXentLoss": NTXentLoss(), None: None}
        generation: dict[str | None, dict[str, Any]] = {
            "sft": {"sft": SFTLoss()},
            "dpo": {"dpo": DPOLoss(weight=0.5)},
            None: {},
        }
        if con_loss_type not in contrastive:
            raise ValueError(f"unknown con_loss_type {con_loss_type!r}: choose one of {_names(contrastive)}")
        if gen_loss_type not in generation:
            raise ValueError(f"unknown gen_loss_type {gen_loss_type!r}: choose one of {_names(generation)}")
        kl = KLLoss() if use_kl_loss else None
        return cls(contrastive=contrastive[con_loss_type], kl=kl, **generation[gen_loss_type])


def _names(table: dict[str | None, Any]) -> str:
    return ", ".join(map(repr, table))


__all__ = [
    "DPOLoss",
    "KLLoss",
    "Loss",
    "LossInputs",
    "Losses",
    "NTXentLoss",
    "SFTLoss",
    "active",
    "candidate_mask",
    "cosine_scores",
    "dpo",
    "kl_alignment",
    "mean_logps",
    "ntxent",
    "preference_margins",
    "sft",
]

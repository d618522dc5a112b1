"""What a loss is: a weight, the tensors it reads, and a value for each query.

A loss never sees a model, a chunk or a process group. The step (``ullme.trainer.gradcache``) computes only the
tensors that some active loss reads, so a loss that reads no ``logps`` costs no scoring pass, and one that reads no
``ref_logps`` costs no reference pass.

Shapes: B queries, N = 1 + negatives candidates of each (cell [i, 0] is the positive), C >= B queries whose
passages stand in the contrast (all ranks'), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class LossInputs:
    """Named tensors; those that no active loss reads are None."""

    mask: Tensor  # bool [B, N], the cell holds a passage
    query_reps: Tensor | None = None  # [B, D]
    passage_reps: Tensor | None = None  # [C, N, D] for a loss over the batch, [B, N, D] for one over a query
    candidates: Tensor | None = None  # bool [B, C, N], positives and negatives of each query in the batch
    positives: Tensor | None = None  # int64 [B], the row of passage_reps whose cell 0 is the query's positive
    logps: Tensor | None = None  # [B, N], log pi_theta(p|q) summed over the tokens of p
    ref_logps: Tensor | None = None  # [B, N], the same of the reference, without gradient
    lengths: Tensor | None = None  # int64 [B, N], tokens of p

    def get(self, name: str, *shape: str) -> Tensor:
        """The tensor ``name``, checked to be there and to have ``len(shape)`` axes."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss reads '{name}', which the step did not compute")
        if value.ndim != len(shape):
            raise ValueError(f"'{name}' must be [{', '.join(shape)}], got shape {list(value.shape)}")
        return value


@dataclass
class Loss:
    """One term of the objective.

    weight: lambda of the sum; must be positive (leave a term out with null rather than with 0).
    """

    weight: float = 1.0

    reads: ClassVar[frozenset[str]] = frozenset()
    over_batch: ClassVar[bool] = False  # True: needs every query's passages at once; False: query by query

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"{type(self).__name__}: weight must be positive, got {self.weight}")

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of each query, [B]."""
        raise NotImplementedError


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis of the masked-in values; rows with none are 0. values, mask [..., N] -> [...]."""
    count = mask.sum(-1)
    return torch.where(mask, values, 0.0).sum(-1) / count.clamp(min=1)


def active(losses: object) -> Iterator[tuple[str, Loss]]:
    """(name, loss) of every member of a ``Losses`` that is not null."""
    for name, loss in vars(losses).items():
        if loss is not None:
            yield name, loss

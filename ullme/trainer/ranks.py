"""The processes that share a batch, and the three things they tell each other.

    R = gather(R_1 .. R_W)            every rank's reps, autograd-aware: its backward adds up what all ranks want of R_r
    g = (1/W) sum_r g_r               once a step, after the last backward
    L = (1/W) sum_r L_r               what is logged

Rank r's loss is the mean over its own B queries against the passages of all ranks, so that g is the gradient of the
mean over all W B queries: the number of ranks changes no loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Gather(torch.autograd.Function):
    """All-gather; the backward adds up over the ranks and keeps this rank's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int, size: int) -> Tensor:
        ctx.own = slice(rank * len(tensor), (rank + 1) * len(tensor))
        tensor = tensor.contiguous()
        pieces = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(pieces, tensor)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.own], None, None


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are; alone, every method is the identity."""

    rank: int = 0
    size: int = 1

    def gather(self, tensor: Tensor) -> Tensor:
        """[B, ...] of each rank -> [W B, ...], rank by rank; gradients flow back to the rank they came from."""
        if self.size == 1:
            return tensor
        return _Gather.apply(tensor, self.rank, self.size)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name, averaged over the ranks in one message."""
        if self.size == 1 or not values:
            return values
        stacked = torch.stack(list(values.values()))
        dist.all_reduce(stacked)
        return dict(zip(values, stacked / self.size, strict=True))

    @torch.no_grad()
    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the accumulated gradients in place, one message a dtype; a rank without a gradient counts as 0."""
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.dtype, []).append(parameter)
        for group in groups.values():
            flat = torch.cat([parameter.grad.flatten() for parameter in group if parameter.grad is not None])
            dist.all_reduce(flat)
            flat /= self.size
            for parameter, grad in zip(group, flat.split([p.numel() for p in group]), strict=True):
                parameter.grad = grad.view_as(parameter)

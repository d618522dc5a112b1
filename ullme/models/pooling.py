"""From token states to one vector a text.

    first     h_1                      last  h_t
    mean      (1/t) sum_i h_i          weighted_mean  sum_i i h_i / sum_i i   (SGPT; Muennighoff 2022, section 4)

h_1 .. h_t are the states of the tokens inside the mask, so the result does not depend on the padding side or amount.
Pooling is done in fp32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["first", "last", "mean", "weighted_mean"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def check_pooling(name: str) -> None:
    if name not in POOLINGS:
        raise ValueError(f"unknown pooling {name!r}: choose one of {', '.join(POOLINGS)}")


def pool(states: Tensor, mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """states [b, L, D], mask [b, L] (1 where a token takes part) -> [b, D] in fp32.

    A text without a single token inside the mask is an error.
    """
    check_pooling(pooling)
    if states.shape[:2] != mask.shape:
        raise ValueError(f"states {list(states.shape)} and mask {list(mask.shape)} disagree")
    mask = mask.bool()
    if not bool(mask.any(-1).all()):
        empty = (~mask.any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"no token left to pool in rows {empty} of the batch: the text is empty or all instruction")
    states = states.float()
    if pooling in ("first", "last"):
        position = torch.arange(mask.shape[1], device=mask.device)
        if pooling == "first":
            index = torch.where(mask, position, mask.shape[1]).amin(-1)
        else:
            index = torch.where(mask, position, -1).amax(-1)
        return states[torch.arange(len(states), device=states.device), index]
    weights = mask.cumsum(-1) * mask if pooling == "weighted_mean" else mask
    weights = weights.float()
    return (states * weights[..., None]).sum(1) / weights.sum(-1, keepdim=True)

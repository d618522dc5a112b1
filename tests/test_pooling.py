"""Pooling is padding-agnostic, equals its equation, and refuses an empty text and an unknown name."""

from __future__ import annotations

import pytest
import torch

from ullme.models.pooling import POOLINGS, pool

STATES = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
EXPECTED = {
    "first": [1.0, 10.0],
    "last": [4.0, 40.0],
    "mean": [7 / 3, 70 / 3],
    "weighted_mean": [(1 + 4 + 12) / 6, (10 + 40 + 120) / 6],
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 3), (1, 2)])
def test_equation_under_any_padding(pooling, left, right):
    padded = torch.cat([torch.full((left, 2), 99.0), STATES, torch.full((right, 2), -99.0)])[None]
    mask = torch.tensor([[0] * left + [1] * 3 + [0] * right])
    torch.testing.assert_close(pool(padded, mask, pooling)[0], torch.tensor(EXPECTED[pooling]))


def test_half_precision_states_are_pooled_in_fp32():
    states = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    assert pool(states, torch.ones(1, 4096), "mean").item() == 1.0  # a bf16 sum would stop at 256


def test_unknown_name_and_empty_text():
    with pytest.raises(ValueError, match="unknown pooling 'cls': choose one of first, last, mean, weighted_mean"):
        pool(STATES[None], torch.ones(1, 3), "cls")
    with pytest.raises(ValueError, match=r"no token left to pool in rows \[1\]"):
        pool(torch.stack([STATES, STATES]), torch.tensor([[1, 1, 1], [0, 0, 0]]), "mean")

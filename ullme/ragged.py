"""Token rows of unequal length, kept without padding until a chunk is formed.

The axes of the problem stay real: ``lengths`` has shape [B] for queries and [B, N] for a query's N candidate
passages, and cell (i, j) is row i * N + j of the flat storage. Padding exists only inside a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of token ids.

    tokens: int64 [sum(lengths)], the rows one after another.
    lengths: int64, any shape; a cell without a text has length 0.
    """

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], shape: tuple[int, ...] | None = None) -> Ragged:
        """Pack lists of ids; ``shape`` (default [len(rows)]) must hold as many cells as there are rows."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        return cls(tokens, lengths.reshape(shape) if shape is not None else lengths)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.lengths.shape)

    @cached_property
    def _starts(self) -> Tensor:
        flat = self.lengths.flatten()
        return flat.cumsum(0) - flat

    def __getitem__(self, cell: int | tuple[int, ...]) -> Tensor:
        """Ids of one cell, int64 [l]."""
        index = (cell,) if isinstance(cell, int) else cell
        row = 0
        for i, size in zip(index, self.shape, strict=True):
            if not -size <= i < size:
                raise IndexError(f"cell {cell} is outside a Ragged of shape {self.shape}")
            row = row * size + i % size
        start = int(self._starts[row])
        return self.tokens[start : start + int(self.lengths.flatten()[row])]

    def pad(self, rows: Tensor, pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
        """The flat ``rows`` as one rectangle.

        rows: int64 [b], indices into the flattened cells.
        Returns input_ids int64 [b, L] and attention_mask int64 [b, L], L the longest of these rows.
        """
        lengths = self.lengths.flatten()[rows]
        width = int(lengths.max()) if len(rows) else 0
        column = torch.arange(width, device=self.tokens.device)
        offset = (width - lengths)[:, None] if side == "left" else torch.zeros_like(lengths)[:, None]
        inside = (column >= offset) & (column < offset + lengths[:, None])
        source = (self._starts[rows][:, None] + column - offset).clamp(0, max(len(self.tokens) - 1, 0))
        ids = torch.where(inside, self.tokens[source], pad_id)
        return ids, inside.long()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        return Ragged(
            self.tokens.to(device, non_blocking=non_blocking), self.lengths.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Ragged:
        return Ragged(self.tokens.pin_memory(), self.lengths.pin_memory())


def plan_chunks(lengths: Tensor, budget: int) -> list[Tensor]:
    """Cut rows, longest first, into chunks whose padded size stays within ``budget`` tokens.

    lengths: int64 [n]; rows of length 0 are left out. A row longer than the budget is a chunk of its own.
    Returns int64 index tensors that cover every other row once; neighbours in length, so padding is a few per cent.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be positive, got {budget}")
    order = lengths.argsort(descending=True, stable=True)
    order = order[lengths[order] > 0]
    chunks = []
    while len(order):
        take = max(1, budget // int(lengths[order[0]]))
        chunks.append(order[:take])
        order = order[take:]
    return chunks

"""How likely each candidate passage is, given the query: log pi(p|q), causal.

    log pi(p|q) = sum_i log softmax(W h(q, w_<i))[w_i],   w_1 .. w_t the tokens of p

The candidates of a query share one row, [q][p+][p-1]..., so that the query is read once: a passage sees the query and
itself, and its positions start after the query. Where a family cannot do that exactly, each candidate has a row of its
own, [q][p]; the scores are the same. Vocabulary logits exist only at passage tokens and only a slice at a time.

Shapes: b queries, N candidates, r rows of width L, T passage tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ullme.ragged import Ragged

from .backbones import LMHead

PADDING = -1
SLICE_ELEMENTS = 2**24  # elements of one slice of logits in the plain path: 64 MiB in fp32


@dataclass(frozen=True)
class Layout:
    """Rows to run through the decoder, and where each passage token is predicted.

    input_ids, positions int64 [r, L]; segments int64 [r, L], 0 for the prompt, n + 1 for candidate n, -1 for padding;
    source int64 [T], the flat place r * L + l whose state predicts the token; targets int64 [T]; cell int64 [T], the
    flat cell b * N + n the token belongs to.
    """

    input_ids: Tensor
    positions: Tensor
    segments: Tensor
    source: Tensor
    targets: Tensor
    cell: Tensor

    def to(self, device: torch.device) -> Layout:
        return Layout(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def row_lengths(prompts: Tensor, targets: Tensor, shared: bool) -> Tensor:
    """Tokens that a query costs: in its longest row, times its rows. prompts [B], targets [B, N] lengths -> [B]."""
    run = (targets - 1).clamp(min=0)  # the last token of a passage is predicted but never read
    if shared:
        return prompts + run.sum(-1)
    return (prompts + run.amax(-1)) * (targets > 0).sum(-1).clamp(min=1)


def lay_out(prompts: Ragged, targets: Ragged, queries: Tensor, shared: bool, pad_id: int) -> Layout:
    """Rows for the ``queries`` (int64 [b]) of prompts [B] and targets [B, N]."""
    if targets.lengths.ndim != 2 or prompts.lengths.ndim != 1:
        raise ValueError(f"expected prompts [B] and targets [B, N], got {prompts.shape} and {targets.shape}")
    width = targets.shape[1]
    prompt_lengths, target_lengths = prompts.lengths[queries], targets.lengths[queries]  # [b], [b, N]
    if bool((prompt_lengths < 1).any()):
        raise ValueError("a prompt has no token: the first token of a passage would have nothing to be predicted from")
    run = (target_lengths - 1).clamp(min=0)
    if shared:
        row = torch.arange(len(queries))[:, None].expand_as(run)
        start = prompt_lengths[:, None] + run.cumsum(-1) - run
        row_query = torch.arange(len(queries))
    else:
        exists = target_lengths > 0
        row = torch.where(exists, exists.flatten().cumsum(0).reshape(exists.shape) - 1, 0)
        start = prompt_lengths[:, None].expand_as(run)
        row_query = torch.arange(len(queries))[:, None].expand_as(run)[exists]

    # every passage token: its cell, its place i in the passage
    flat_lengths = target_lengths.flatten()
    cell = torch.arange(flat_lengths.numel()).repeat_interleave(flat_lengths)
    place = torch.arange(len(cell)) - (flat_lengths.cumsum(0) - flat_lengths).repeat_interleave(flat_lengths)
    cells = (queries[:, None] * width + torch.arange(width)).flatten()
    tokens = _gather(targets, cells)
    prompt_of = prompt_lengths.repeat_interleave(width)[cell]
    token_row, token_start = row.flatten()[cell], start.flatten()[cell]
    read = place < flat_lengths[cell] - 1

    # every prompt token of every row
    prompt_rows = torch.arange(len(row_query)).repeat_interleave(prompt_lengths[row_query])
    lengths = prompt_lengths[row_query]
    prompt_place = torch.arange(len(prompt_rows)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)

    row_length = torch.zeros(len(row_query), dtype=torch.int64)
    row_length = row_length.scatter_reduce(0, row.flatten(), (start + run).flatten(), "amax").maximum(lengths)
    columns = int(row_length.max())
    shape = (len(row_query), columns)
    input_ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    segments = torch.full(shape, PADDING)
    at = (prompt_rows, prompt_place)
    input_ids[at], positions[at], segments[at] = _gather(prompts, queries[row_query]), prompt_place, 0
    at = (token_row[read], (token_start + place)[read])
    input_ids[at], positions[at] = tokens[read], (prompt_of + place)[read]
    segments[at] = cell[read] % width + 1
    column = torch.where(place == 0, prompt_of - 1, token_start + place - 1)
    return Layout(input_ids, positions, segments, token_row * columns + column, tokens, cell)


def _gather(rows: Ragged, cells: Tensor) -> Tensor:
    """Tokens of the flat ``cells``, one after another."""
    ids, inside = rows.pad(cells, pad_id=0)
    return ids[inside.bool()]


def token_logps(states: Tensor, targets: Tensor, head: LMHead) -> Tensor:
    """log softmax(head(h))[w] of each token: states [T, D], targets int64 [T] -> [T] in fp32.

    Never holds [T, V] logits: PyTorch's chunked linear cross-entropy in fp32 where this PyTorch has it, else slices
    that are recomputed in the backward pass. Values and gradients are the same.
    """
    if len(targets) == 0:
        return states.new_zeros(0, dtype=torch.float32)
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        states = states.to(dtype)
        if dtype == torch.float32 and head.is_linear and hasattr(F, "linear_cross_entropy"):
            return -F.linear_cross_entropy(
                states,
                head.weight.to(dtype),
                targets,
                linear_bias=None if head.bias is None else head.bias.to(dtype),
                reduction="none",
                options=torch.nn.LinearCrossEntropyOptions(),
            )
        rows = max(1, SLICE_ELEMENTS // head.weight.shape[0])
        slices = zip(states.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(_sliced_logps, s, t, head, use_reentrant=False) for s, t in slices])


def _sliced_logps(states: Tensor, targets: Tensor, head: LMHead) -> Tensor:
    return -F.cross_entropy(head.logits(states), targets, reduction="none")


def sum_per_cell(logps: Tensor, cell: Tensor, shape: tuple[int, int]) -> Tensor:
    """log pi(p|q) from its tokens: logps, cell [T] -> [b, N]; a cell without a passage is 0."""
    total = logps.new_zeros(shape[0] * shape[1]).index_add(0, cell, logps)
    return total.reshape(shape)

"""One row for a query and all its passages, [q][p1][p2]..., so that the query is read once.

    token i sees token j  iff  segment_j in {0, segment_i}  and  0 <= position_i - position_j < W

Segment 0 is the prompt, n the n-th passage, -1 padding; positions restart after the prompt for every passage. Windows W
of sliding layers and chunks of chunked layers count positions, not places in the row. Invariant: states are those of
separate rows [q][p1], [q][p2]... Recurrent layers, ALiBi and kernels that take no such mask cannot do it:
``supports_shared_layout`` says so.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .attention import position_ids, undisturbed
from .backbones import accepted, inner_decoder

log = logging.getLogger(__name__)

MASKED_BY_POSITION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types of a configuration whose whole pattern is in the mask."""

COUNT_PLACES = ("window_size", "keep_window_size")
"""Settings of windows that GPT-Neo and Doge count in places of the row, inside their layers."""

TRIAL_LENGTH = 8  # tokens of a prompt and, roughly, of a passage in the trial at load


def shared_mask(segments: Tensor, positions: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Who sees whom, bool [r, 1, L, L], from segments and positions, int64 [r, L]. Padding sees itself alone."""
    seeing, seen = segments[:, :, None], segments[:, None, :]
    positions = positions.int()  # [r, L, L] of them
    distance = positions[:, :, None] - positions[:, None, :]
    allowed = ((seen == 0) | (seen == seeing)) & (seeing >= 0) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    if chunk is not None:
        allowed &= positions[:, :, None] // chunk == positions[:, None, :] // chunk
    return (allowed | torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device))[:, None]


def mask_argument(model: PreTrainedModel, segments: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The decoder's ``attention_mask`` for rows of the shared layout.

    segments, positions: int64 [r, L]. Returns [r, 1, L, L], bool for SDPA and additive for eager; where the layers of
    the model differ in their windows, one for each layer type.
    """
    config = model.config.get_text_config(decoder=True)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    limits = {"sliding_attention": {"window": window}, "chunked_attention": {"chunk": chunk}}

    def mask(kind: str) -> Tensor:
        allowed = shared_mask(segments, positions, **limits.get(kind, {}))
        if config._attn_implementation == "sdpa":
            return allowed
        lowest = torch.finfo(model.dtype).min
        return torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, lowest)

    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    masks = {kind: mask(kind) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]


def supports_shared_layout(model: PreTrainedModel) -> bool:
    """Whether rows of the shared layout give ``model``, causal, the states of separate rows.

    Tried out on a few tokens, with its windows and chunks narrowed for the trial so that these outreach them. Settings,
    training flags and random state are left as they were.
    """
    config = model.config.get_text_config(decoder=True)
    if (
        config._attn_implementation not in ("sdpa", "eager")
        or not MASKED_BY_POSITION.issuperset(getattr(config, "layer_types", None) or ())
        or any(getattr(config, name, None) for name in COUNT_PLACES)
        or not accepted(inner_decoder(model), position_ids=None)
    ):
        return False
    limits = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    device = model.device
    try:
        for name, limit in limits.items():
            if limit:
                setattr(config, name, TRIAL_LENGTH // 2)
        with undisturbed(model, device):
            error = _trial(model, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as refusal:  # whatever a family raises at a mask that it does not expect
        log.debug("%s refuses the shared layout: %r", config.model_type, refusal)
        return False
    finally:
        for name, limit in limits.items():
            if limit:
                setattr(config, name, limit)
    return error < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2)


def _trial(model: PreTrainedModel, device: torch.device, length: int = TRIAL_LENGTH) -> float:
    """Median relative difference, over the tokens of passages, between the states of one row and of separate rows."""
    decoder = inner_decoder(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    def tokens(start: int, count: int) -> Tensor:
        return (11 + 7 * torch.arange(start, start + count, device=device)) % vocabulary

    def states(ids: Tensor, mask: Tensor | dict[str, Tensor], positions: Tensor) -> Tensor:
        inputs = accepted(decoder, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return decoder(**inputs)[0].float()

    prompt = tokens(0, length)
    passages = [tokens(length * n, length + extra) for n, extra in ((1, 2), (2, 0), (3, 1))]
    places = [torch.arange(length, length + len(passage), device=device) for passage in passages]
    positions = torch.cat([torch.arange(length, device=device), *places])[None]
    segments = torch.cat([torch.full_like(part, n) for n, part in enumerate([prompt, *passages])])[None]
    shared = states(torch.cat([prompt, *passages])[None], mask_argument(model, segments, positions), positions)[0]

    rows = pad_sequence([torch.cat([prompt, passage]) for passage in passages], batch_first=True)
    inside = pad_sequence([torch.ones(length + len(p), dtype=torch.long, device=device) for p in passages], True)
    separate = states(rows, inside, position_ids(inside))
    expected = torch.cat([row[length : length + len(p)] for row, p in zip(separate, passages, strict=True)])

    later = slice(len(passages[0]), None)  # the first passage lies where its own row has it
    difference = (shared[length:] - expected)[later].norm(dim=-1) / expected[later].norm(dim=-1)
    return difference.median().item()

"""The causal <-> bidirectional switch, for any Hugging Face decoder.

A causal layer computes ``softmax(q kᵀ / √d + M) v`` with ``M[i, j] = -inf`` for ``j > i``; a bidirectional one drops
that term and keeps padding and windows: ``|i - j| <= W`` in a sliding layer (FlashAttention: ``< W``), "same chunk" in
a chunked one. The switch says so through the ``is_causal`` contract of transformers, on the configuration and on the
attention modules; no modelling file is copied. A hybrid's attention layers turn; its recurrent ones stay.

Invariant: inside ``bidirectional()`` the last token moves the first state; outside it does not, and the model is what
it was, bit for bit. A forward that checkpointing recomputes keeps the mode it had, wherever ``backward`` runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, chunked_overlay

RECURRENT = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})
"""Model types without an attention layer: there is nothing to turn."""
_ABSENT = object()
_turned: list[PreTrainedConfig] = []  # of the models that are bidirectional now


class UnsupportedBackbone(ValueError):
    """The model cannot be turned between causal and bidirectional attention."""


class AttentionSwitch:
    """Turns ``model``, a PreTrainedModel or one inside a PEFT or FSDP wrapper, for the length of a ``with`` block.

    Blocks nest; those of two threads exclude each other, so threads that share a model put every forward in a block.
    The first forward after checkpointing is enabled stands in a block, of either kind: its functions are new then.
    A configuration that is bidirectional by itself stays so outside the blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reset(model)
        _register_mask_builders()
        self._scan()

    def _reset(self, model: nn.Module) -> None:
        self.model = model
        self._sites: list[tuple[dict[str, Any], str, Any]] = []  # an attribute, and its value while bidirectional
        self._configs: list[PreTrainedConfig] = []
        self._saved: list[tuple[dict[str, Any], str, Any]] | None = None
        self._triangles: dict[int, tuple[Tensor, Tensor]] = {}
        self._blocks, self._replays = threading.RLock(), threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}  # a lock cannot be copied; the next scan finds the rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset(**state)

    @property
    def active(self) -> bool:
        """Whether the model is bidirectional now."""
        return self._saved is not None

    def bidirectional(self) -> AbstractContextManager[None]:
        """Every token attends to every other: ``with switch.bidirectional(): model(...)``."""
        return self._block(True)

    def causal(self) -> AbstractContextManager[None]:
        """The model's own attention, also where a bidirectional block is open: for ``generate`` and for scoring."""
        return self._block(False)

    @contextmanager
    def _block(self, bidirectional: bool) -> Iterator[None]:
        with self._blocks:
            if not self.active:
                self._scan()
            with self._mode(bidirectional):
                yield

    @contextmanager
    def _mode(self, bidirectional: bool) -> Iterator[None]:
        previous = self.active
        self._turn(bidirectional)
        try:
            yield
        finally:
            self._turn(previous)

    def _turn(self, bidirectional: bool) -> None:
        if bidirectional and self._saved is None:
            self._saved = [(holder, key, holder.get(key, _ABSENT)) for holder, key, _ in self._sites]
            for holder, key, value in self._sites:
                holder[key] = value
            _turned.extend(self._configs)
        elif not bidirectional and self._saved is not None:
            for holder, key, value in self._saved:
                if value is _ABSENT:
                    del holder[key]
                else:
                    holder[key] = value
            self._saved = None
            _turned[:] = [config for config in _turned if not any(config is mine for mine in self._configs)]

    def _scan(self) -> None:
        """Find what a turn changes. Adapters, wrappers and checkpointing may have come since the last scan."""
        sites: list[tuple[dict[str, Any], str, Any]] = []
        configs: dict[int, PreTrainedConfig] = {}
        for attributes in _module_attributes(self.model):
            config = attributes.get("config")
            if isinstance(config, PreTrainedConfig):
                configs[id(config)] = config
            if attributes.get("is_causal") is True:
                sites.append((attributes, "is_causal", False))
            buffers = attributes["_buffers"]
            triangle = buffers.get("bias")  # gpt_neo and openai-gpt keep their causal mask as a buffer
            if triangle is not None and triangle.ndim == 4 and triangle.shape[-1] == triangle.shape[-2]:
                sites.append((buffers, "bias", self._symmetric(triangle)))
            for key in ("_gradient_checkpointing_func", "checkpoint_fn"):  # of transformers, of FSDP's wrapper
                function = attributes.get(key)
                if callable(function) and getattr(function, "switch", None) is not self:
                    inner = function.checkpoint if isinstance(function, _Replay) else function
                    attributes[key] = _Replay(inner, self)
        self._configs = list(configs.values())
        self._sites = sites + [(vars(config), "is_causal", False) for config in self._configs]

    def _symmetric(self, triangle: Tensor) -> Tensor:
        if id(triangle) not in self._triangles:
            self._triangles[id(triangle)] = triangle, torch.maximum(triangle, triangle.mT)
        return self._triangles[id(triangle)][1]


def _module_attributes(root: nn.Module) -> Iterator[dict[str, Any]]:
    """``vars`` of the modules (getattr would ask PEFT's wrappers), without what is inside a layer with an adapter."""
    waiting, seen = [root], set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield (attributes := vars(module))
            children = attributes["_modules"]
            waiting.extend(() if "base_layer" in children else children.values())


@dataclass(frozen=True)
class _Replay:
    """A checkpoint function whose recomputation takes the mode that the forward had."""

    checkpoint: Callable[..., Any]
    switch: AttentionSwitch

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the mode is part of the graph
            return self.checkpoint(function, *args, **kwargs)
        mode = self.switch.active

        def replayed(*args: Any, **kwargs: Any) -> Any:
            # Autograd recomputes in threads of its own while the caller of backward may hold a block: another lock.
            with self.switch._replays, self.switch._mode(mode):
                return function(*args, **kwargs)

        return self.checkpoint(replayed, *args, **kwargs)


@dataclass(frozen=True)
class _MaskBuilder:
    """A mask builder of transformers, corrected for configurations that a switch holds bidirectional."""

    name: str
    build: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if any(config is turned for turned in _turned):
            if "allow_is_bidirectional_skip" not in kwargs:  # the chunked builder alone does not read is_causal
                mask, none = kwargs.get("attention_mask"), torch.zeros(kwargs["batch_size"], dtype=torch.long)
                left_padding = none.to(kwargs["device"]) if mask is None else (mask.cumsum(-1) == 0).sum(-1)
                same_chunk = chunked_overlay(kwargs["local_size"], left_padding)
                kwargs |= {"mask_function": same_chunk, "allow_is_causal_skip": False}
            elif self.name == "eager":  # several eager layers read "no mask" as "causal"
                kwargs["allow_is_bidirectional_skip"] = False
        return self.build(*args, **kwargs)


def _register_mask_builders() -> None:
    for name in ("sdpa", "eager", "flex_attention"):
        builder = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not isinstance(builder, _MaskBuilder):
            AttentionMaskInterface.register(name, _MaskBuilder(name, builder))


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, for a trial at load; training flags and random state are put back after."""
    training = {module: module.training for module in model.modules()}
    generators = [device] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(generators):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def check_switch(model: PreTrainedModel, switch: AttentionSwitch, *, device: torch.device | str | None = None) -> None:
    """Prove on a few tokens that ``switch`` turns ``model``; modes and random state are left as they were.

    Bidirectional, the last token must move the first state, with and without padding in the batch; causal, it must not,
    unless the configuration is bidirectional by itself. ``device`` takes the token ids (default: the model's).
    Raises UnsupportedBackbone, which names the model type.
    """
    text = model.config.get_text_config(decoder=True)
    if text.model_type in RECURRENT:
        raise UnsupportedBackbone(
            f"{text.model_type} is purely recurrent, without attention to make bidirectional: choose another backbone"
        )
    device = torch.device(device or model.device)
    with undisturbed(model, device):
        with switch.causal():
            causal = _first_state_moves(model, device, padded=False)
        with switch.bidirectional():
            turned = [_first_state_moves(model, device, padded) for padded in (False, True)]
    native = not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all")
    least = 1e-6 + (0 if native else 4 * causal)  # routed experts may round differently
    if not all(change > least for change in turned):
        raise UnsupportedBackbone(
            f"{text.model_type} ({text._attn_implementation} attention) does not turn: another last token changes the "
            f"first state by {causal:.0e} in causal mode (0 expected) and by {min(turned):.0e} in bidirectional mode; "
            "choose another attn_implementation or backbone"
        )


def _first_state_moves(model: PreTrainedModel, device: torch.device, padded: bool, length: int = 8) -> float:
    """Median relative change, in [0, 1], of the first position's output when the last token is another one."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    row = torch.arange(vocabulary // 2, vocabulary // 2 + length, device=device) % vocabulary
    other = torch.cat([row[:-1], row[-1:] // 2])
    mask = torch.ones_like(ids := torch.stack([row, other, row]))
    mask[2, length // 2 :] = not padded
    first, moved = model(input_ids=ids, attention_mask=mask, use_cache=False)[0][:2, 0].float()
    scale = (first.abs() + moved.abs()).clamp_min(torch.finfo(torch.float32).tiny)
    return ((first - moved).abs() / scale).median().item()


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that do not depend on the side of the padding: int64 [b, L], 0 at each row's first token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)

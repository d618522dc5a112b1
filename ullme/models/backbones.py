"""What differs between decoder families, read from the model itself: its inner decoder, its LM head, its pad token.

    logits = softcap( scale * (h W^T + b) ),   softcap(x) = c tanh(x / c)

Families say ``scale`` and ``c`` in their configuration (Cohere, Granite, Gemma 2 ...); ``LMHead.check`` compares the
formula with the model's own logits, so that a family that does something else is refused, never scored wrongly.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .attention import UnsupportedBackbone, undisturbed

BUILT_IN = {"docs-lm": Path(__file__).resolve().parents[1] / "assets" / "docs-lm"}
"""Language models that this package ships, by the name that stands for a Hugging Face id."""

SETTINGS = "ullme.json"
"""The file of an export of ours that says how it turns a text into a vector."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def resolve(name_or_path: str) -> str:
    """The folder of a built-in model; any other name as it is."""
    return str(BUILT_IN.get(name_or_path, name_or_path))


def load_backbone(
    name_or_path: str,
    *,
    model_type: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    zero_dropout: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a Hugging Face id or folder.

    model_type: expected family, checked against the model's own configuration. zero_dropout: switch off the base's own
    dropout, so that policy and reference differ by the adapter alone. Raises ValueError in one sentence.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    name_or_path = resolve(name_or_path)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **source)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded(name_or_path, error)) from error
    if model_type is not None and config.model_type != model_type:
        raise ValueError(
            f"model_backbone_type is {model_type!r} but {name_or_path} is a {config.model_type!r}: leave the key out"
        )
    exported = Path(name_or_path) / SETTINGS
    if exported.is_file() and json.loads(exported.read_text())["turned_on_disk"]:
        del config.is_causal  # written for other tools; here the switch turns the model, and generation stays causal
    if zero_dropout:
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
    extra: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if load_in_4bit:
        extra["quantization_config"] = _four_bit()
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, config=config, dtype=DTYPES[dtype], **extra, **source)
    except OSError as error:
        raise ValueError(_not_loaded(name_or_path, error)) from error
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedBackbone(f"{name_or_path} is a {config.model_type!r}, which is no causal LM") from error
        raise


def load_tokenizer(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face id or folder, with a pad token (its EOS where it has none)."""
    name_or_path = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded(name_or_path, error)) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name_or_path} has neither a pad nor an EOS token: add a pad token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _not_loaded(name_or_path: str, error: Exception) -> str:
    return (
        f"cannot load {name_or_path!r}: it is neither a folder with a model here nor reachable on the Hugging Face "
        f"Hub (no network, a private model or a misspelt name?); {str(error).splitlines()[0]}"
    )


def _four_bit() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs the package bitsandbytes: pip install 'ullme[gpu]', or set it to false")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Non-reentrant activation checkpointing, under whichever name this transformers has for it."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{model.config.model_type} has no activation checkpointing: set gradient_checkpointing to false"
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def inner_decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder without its LM head, the child that reads the token embeddings: returns states, runs no logits."""
    embeddings = model.get_input_embeddings()
    for child in model.children():
        if child is not embeddings and any(module is embeddings for module in child.modules()):
            return child
    raise UnsupportedBackbone(f"{model.config.model_type} has no inner decoder apart from its LM head")


def accepted(module: nn.Module, **kwargs: Any) -> dict[str, Any]:
    """Those of ``kwargs`` that ``module.forward`` names (some families read no ``position_ids``)."""
    parameters = inspect.signature(module.forward).parameters
    return {key: value for key, value in kwargs.items() if key in parameters}


@dataclass(frozen=True)
class LMHead:
    """The map from a hidden state to vocabulary logits. weight [V, D], bias [V] or None."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LMHead:
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def is_linear(self) -> bool:
        return self.scale == 1.0 and not self.softcap

    def logits(self, states: Tensor) -> Tensor:
        """[n, D] -> [n, V] in fp32."""
        bias = None if self.bias is None else self.bias.to(states.dtype)
        logits = nn.functional.linear(states, self.weight.to(states.dtype), bias).float() * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def check(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedBackbone unless ``logits`` equals the model's own output on a few tokens."""
        ids = torch.arange(4, 12, device=self.weight.device)[None]
        mask = torch.ones_like(ids)
        decoder = inner_decoder(model)
        with undisturbed(model, ids.device):
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            states = decoder(**accepted(decoder, input_ids=ids, attention_mask=mask, use_cache=False))[0]
            got = self.logits(states)
        spread = float(expected.std())
        if got.shape != expected.shape or float((got - expected).abs().max()) > 0.02 * max(spread, 1e-3):
            raise UnsupportedBackbone(
                f"{model.config.model_type} maps hidden states to logits in a way that this version cannot score: "
                "leave out the generation losses (sft, dpo, kl)"
            )

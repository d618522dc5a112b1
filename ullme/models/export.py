"""A trained model as a folder that every tool opens.

    W' = W + (alpha / r) B A, merged in fp32, rounded once to the base's dtype

The folder is a causal LM of transformers with ``is_causal: false`` in config.json, the module files that make
``SentenceTransformer(folder)`` pool, normalise and prompt as in training, the tokenizer, ``ullme.json`` (the settings),
and ``adapter/`` with the PEFT adapter. Invariant: the reopened folder gives the trainer's embeddings; a difference is
an error, and the folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ullme.data.template import Template

from .backbones import SETTINGS, load_tokenizer

if TYPE_CHECKING:
    from .ullme import ULLME

PARITY_TEXTS = (
    "attention",
    "Return the shortest path between two nodes of a weighted graph.",
    "In 1843 the bridge was opened to the public; a toll of one penny was charged until 1911.",
    "def softmax(x): return exp(x) / exp(x).sum()",
)


def export(model: ULLME, folder: str | Path) -> Path:
    """Write ``model`` to ``folder`` (replacing an earlier export there) and check that it opens to the same model."""
    folder = Path(folder)
    if folder.exists() and not (folder / SETTINGS).is_file():
        raise FileExistsError(f"{folder} exists and is no export ({SETTINGS} is not in it): choose another folder")
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _save_merged(model, aside)
    _save_sentence_transformer(model, aside)
    _save_settings(model, aside)
    if isinstance(model.backbone, PeftModel):
        _save_adapter(model, aside / "adapter")
    check_parity(model, aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def merged_state(model: ULLME) -> dict[str, Tensor]:
    """The weights of the base with the adapter merged in, under the base's own names."""
    if getattr(model.base, "is_quantized", False):
        raise ValueError("a 4-bit base cannot be merged: open the adapter over an unquantised base and export that")
    state = {}
    for name, tensor in model.base.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor.detach()
    for name, layer in model.base.named_modules():
        if isinstance(layer, LoraLayer):
            key = f"{name}.weight"
            delta = sum(cast(Any, layer).get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            state[key] = (state[key].float() + delta).to(state[key].dtype)
    return state


@torch.no_grad()
def _save_merged(model: ULLME, folder: Path) -> None:
    config = type(model.base.config).from_dict(model.base.config.to_dict())
    if model.attention == "bidirectional":
        config.is_causal = False
    config.dtype = model.base.dtype
    with torch.device("meta"):
        clean: PreTrainedModel = type(model.base)(config)
    state = merged_state(model)
    missing, unexpected = clean.load_state_dict(state, strict=False, assign=True)
    clean.tie_weights()
    missing = [name for name in missing if clean.get_parameter_or_buffer(name).is_meta]
    if missing or unexpected:
        raise RuntimeError(f"the merged weights do not fit the model: missing {missing}, unexpected {unexpected}")
    clean.generation_config = model.base.generation_config
    clean.save_pretrained(folder)
    _closing_tokenizer(model).save_pretrained(folder)


def _closing_tokenizer(model: ULLME) -> PreTrainedTokenizerBase:
    """The tokenizer, made to append EOS by itself where the template does."""
    if not model.template.append_eos:
        return model.tokenizer
    tokenizer = load_tokenizer(model.name_or_path)
    ids = tokenizer("")["input_ids"]  # the special tokens alone
    if not ids or ids[-1] != tokenizer.eos_token_id:
        frame = [*tokenizer.convert_ids_to_tokens(ids), "$A", tokenizer.eos_token]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join(frame),
            special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in {*frame} - {"$A"}],
        )
    return tokenizer


def _save_sentence_transformer(model: ULLME, folder: Path) -> None:
    """The files of sentence-transformers: Transformer, Pooling, Normalize, and the prompts."""
    query, query_after = model.template.around("query")
    passage, passage_after = model.template.around("passage")
    if query_after or passage_after:
        raise ValueError(
            "sentence-transformers can put a prompt only in front of a text, and the template has "
            f"{(query_after or passage_after)!r} behind it: end the template with {{text}} to export"
        )
    modes = {"first": "cls", "last": "lasttoken", "mean": "mean", "weighted_mean": "weightedmean"}
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    pooling = {"word_embedding_dimension": model.dim, "include_prompt": model.pool_instruction} | {
        f"pooling_mode_{key}": modes[model.pooling] == value
        for key, value in (
            ("cls_token", "cls"),
            ("mean_tokens", "mean"),
            ("max_tokens", "max"),
            ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
            ("weightedmean_tokens", "weightedmean"),
            ("lasttoken", "lasttoken"),
        )
    }
    prompts = {"prompts": {"query": query, "document": passage}, "default_prompt_name": "document"}
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": model.texts.max_passage_length})
    _write(folder / "config_sentence_transformers.json", prompts | {"similarity_fn_name": "cosine"})


def _save_settings(model: ULLME, folder: Path) -> None:
    turned = model.attention == "bidirectional" and getattr(model.base.config, "is_causal", None) is not False
    _write(folder / SETTINGS, model.settings() | {"base": model.name_or_path, "turned_on_disk": turned})


def _save_adapter(model: ULLME, folder: Path) -> None:
    assert isinstance(model.backbone, PeftModel)
    model.backbone.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" asks the Hub
    named = folder / str(model.adapter)
    if named.is_dir():  # PEFT puts every adapter but "default" into a folder of its name
        for file in named.iterdir():
            file.rename(folder / file.name)
        named.rmdir()
    _save_settings(model, folder)


def check_parity(model: ULLME, folder: Path, tolerance: float | None = None) -> float:
    """Largest difference between the unit vectors of ``model`` and of SentenceTransformer(folder), which must be small.

    tolerance: default 1e-4 for an fp32 model, 0.05 for a half-precision one.
    """
    from sentence_transformers import SentenceTransformer

    with _quiet():
        reopened = SentenceTransformer(str(folder), device="cpu")
    half = model.base.dtype in (torch.bfloat16, torch.float16)
    limit = (0.05 if half else 1e-4) if tolerance is None else tolerance
    worst = 0.0
    queries, passages = model.encode(PARITY_TEXTS, kind="query"), model.encode(PARITY_TEXTS, kind="passage")
    for expected, name in ((queries, "query"), (passages, "document")):
        got = reopened.encode(list(PARITY_TEXTS), prompt_name=name, show_progress_bar=False)
        worst = max(worst, float(np.abs(expected - got).max()))
    if not worst <= limit:
        raise RuntimeError(
            f"the exported {model.base.config.model_type} does not embed as the trained model does (difference "
            f"{worst:.2g}, allowed {limit:.2g}): its plain configuration cannot carry {model.attention} attention or "
            f"{model.pooling} pooling"
        )
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the report that a model opened for its states has no use for the LM head."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def read_settings(folder: Path) -> dict[str, Any]:
    """Keyword arguments of ``ULLME`` that ``ullme.json`` in the folder holds; none where there is no such file."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    settings = json.loads(path.read_text())
    del settings["base"], settings["turned_on_disk"]
    return settings | {"template": Template.from_dict(settings["template"])}


def open_export(cls: type[ULLME], folder: str | Path, **overrides: Any) -> ULLME:
    """A merged export, or the base of a PEFT adapter folder with the adapter on it; settings from ``ullme.json``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name what export wrote, or a folder with adapter_config.json")
    arguments = read_settings(folder) | overrides
    if not (folder / "adapter_config.json").is_file():
        return cls(str(folder), **arguments)
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    model = cls(**({"model_name_or_path": base} | arguments))
    model.backbone = PeftModel.from_pretrained(model.base, str(folder))
    model.adapter = "default"
    return model


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")

"""From a word on the command line to a model that mteb can evaluate.

    bm25                                       BM25 (bm25s), no weights
    runs/grl/export                            an export of ours, or a PEFT adapter folder
    base:runs/grl/export                       the model it was trained from, with the same template and pooling
    runs/grl/checkpoints/last.ckpt             a Lightning checkpoint of ours
    a folder or Hub id with modules.json       a SentenceTransformer
    a folder or Hub id with config.json        a plain decoder, embedded with ULLME's defaults; so is docs-lm
    a name that mteb registers                 mteb's own implementation of the model

``find_model`` decides which of these a word is, or says in one sentence that it is none, before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ullme.eval.fingerprint import fingerprint, tokenizer_digest
from ullme.eval.lexical import BM25Searcher
from ullme.models.backbones import BUILT_IN, SETTINGS
from ullme.models.export import read_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ullme.models import ULLME

BM25 = "bm25"
BASE_OF = "base:"
ADAPTER_FILE = "adapter_config.json"
MODULES_FILE = "modules.json"
CONFIG_FILE = "config.json"


def find_model(spec: str, dtype: str | None = None) -> Callable[[], Any]:
    """What loads the model that ``spec`` names; ValueError, in one sentence, where it names none.

    dtype: of the weights, as for ``ULLME``; None is that of the export or of the run, float32 for any other decoder.
    """
    if spec == BM25:
        return BM25Searcher
    if spec in BUILT_IN:
        return lambda: _wrap(_ullme()(spec, **_given(dtype)), spec)
    path = Path(spec.removeprefix(BASE_OF))
    if spec.startswith(BASE_OF):
        return _base_of(spec, path, dtype)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise ValueError(f"{spec} is a file but no Lightning checkpoint (*.ckpt)")
        return lambda: _wrap(_checkpoint(path, **_given(dtype)), spec)
    if path.is_dir():
        return _in_folder(spec, path, dtype)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ValueError(f"no such model: the path {spec} does not exist")
    return _on_hub(spec, dtype)


def load_model(spec: str, dtype: str | None = None) -> Any:
    """An mteb encoder (``WrappedULLME``, SentenceTransformer, mteb's own) or ``BM25Searcher``."""
    return find_model(spec, dtype)()


def _in_folder(spec: str, path: Path, dtype: str | None) -> Callable[[], Any]:
    if (path / "export" / SETTINGS).is_file():
        path = path / "export"
    loader = _by_files(spec, dtype, lambda file: (path / file).is_file(), lambda: str(path))
    if loader is None:
        found = ", ".join(sorted(file.name for file in path.glob("*"))[:8]) or "nothing"
        raise ValueError(
            f"no model in {path}: expected {SETTINGS}, {ADAPTER_FILE}, {MODULES_FILE} or {CONFIG_FILE}, found {found}"
        )
    return loader


def _base_of(spec: str, path: Path, dtype: str | None) -> Callable[[], Any]:
    """An export without its training: what the table calls "before"."""
    if not ((path / SETTINGS).is_file() and (path / CONFIG_FILE).is_file()):
        raise ValueError(f"{spec} needs an export of ours: {SETTINGS} and {CONFIG_FILE} are not both in {path}")
    base = json.loads((path / SETTINGS).read_text())["base"]
    dtype = dtype or json.loads((path / CONFIG_FILE).read_text())["dtype"]
    return lambda: _wrap(_ullme()(base, **read_settings(path), dtype=dtype), spec)


def _on_hub(spec: str, dtype: str | None) -> Callable[[], Any]:
    from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
    from mteb.models.model_implementations import MODEL_REGISTRY

    if spec in MODEL_REGISTRY:
        return lambda: _registered(spec)

    def has(file: str) -> bool:
        try:
            return isinstance(try_to_load_from_cache(spec, file), str) or file_exists(spec, file)
        except Exception:  # whatever the reason, the sentence below names it
            return False

    loader = _by_files(spec, dtype, has, lambda: snapshot_download(spec))
    if loader is None:
        near = difflib.get_close_matches(spec, [BM25, *BUILT_IN, *MODEL_REGISTRY], n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(
            f"no such model: {spec!r} is no folder here, and as a Hub id it is neither in the local cache nor "
            f"reachable (no network, a private model or a misspelt name){hint}"
        )
    return loader


def _by_files(
    spec: str, dtype: str | None, has: Callable[[str], bool], folder: Callable[[], str]
) -> Callable[[], Any] | None:
    """The loader that the files of a model ask for. has: whether a file is there; folder: where, once fetched."""
    if has(ADAPTER_FILE):
        return lambda: _wrap(_ullme().from_pretrained(folder(), **_given(dtype)), spec)
    if has(SETTINGS):
        return lambda: _wrap(_ullme().from_pretrained(folder(), dtype=dtype or "auto"), spec)
    if has(MODULES_FILE):
        return lambda: _sentence_transformer(folder(), spec, dtype)
    if has(CONFIG_FILE):
        return lambda: _wrap(_ullme()(folder(), **_given(dtype)), spec)
    return None


def _given(dtype: str | None) -> dict[str, Any]:
    return {"dtype": dtype} if dtype else {}


def _registered(spec: str) -> Any:
    import mteb

    try:
        return mteb.get_model(spec)
    except OSError as error:
        raise ValueError(f"{spec} is neither in the local cache nor reachable on the Hub (no network?)") from error


def _checkpoint(path: Path, **overrides: Any) -> ULLME:
    from ullme.models.checkpoint import load_checkpoint

    return load_checkpoint(path, **overrides)


def _ullme() -> type[ULLME]:
    from ullme.models import ULLME

    return ULLME


def _wrap(model: ULLME, name: str) -> Any:
    from ullme.eval.encoder import WrappedULLME

    return WrappedULLME.from_model(model.to("cuda" if torch.cuda.is_available() else "cpu"), name)


def _sentence_transformer(folder: str, name: str, dtype: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, model_kwargs={"dtype": dtype} if dtype else None)
    return wrap_sentence_transformer(model, name)


def wrap_sentence_transformer(model: SentenceTransformer, name: str) -> Any:
    """mteb's own encoder for it, under a revision of its own: mteb gives all local ones the same."""
    from mteb import SentenceTransformerEncoderWrapper

    from ullme.eval.encoder import readable_name

    encoder = SentenceTransformerEncoderWrapper(model)
    settings = {
        "modules": str(model),
        "prompts": model.prompts,
        "default_prompt": model.default_prompt_name,
        "similarity": model.similarity_fn_name,
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "tokenizer": tokenizer_digest(model.tokenizer),
    }
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(
        update={"name": f"local/{readable_name(name)}", "revision": fingerprint(model, settings)}
    )
    return encoder


def as_mteb_model(model: Any) -> Any:
    """A ULLME or SentenceTransformer as mteb wants it; an mteb model with a name of its own as it is."""
    from mteb import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    from ullme.eval.encoder import WrappedULLME
    from ullme.models import ULLME

    if isinstance(model, ULLME):
        return WrappedULLME.from_model(model)
    if isinstance(model, SentenceTransformerEncoderWrapper):
        model = model.model
    if isinstance(model, SentenceTransformer):
        return wrap_sentence_transformer(model, "sentence-transformer")
    meta = getattr(model, "mteb_model_meta", None)
    if (
        meta is None
        or meta.name in (None, "no_model_name/available")
        or meta.revision in (None, "no_revision_available")
    ):
        raise TypeError(
            f"cannot evaluate a {type(model).__name__}: expected ULLME, WrappedULLME, SentenceTransformer or an mteb "
            "model whose mteb_model_meta has a name and a revision"
        )
    return model


def build(checkpoint: str | Path, arguments: dict[str, Any]) -> ULLME:
    """The model of a Lightning checkpoint, an adapter folder or an export.

    The checkpoint brings the settings it was trained with, and ``arguments`` of ``ULLME`` that are not None replace
    them; the adapter's rank and scale, which its weights were made for, must be the same where they are given.
    """
    path = Path(checkpoint)
    given = {key: value for key, value in arguments.items() if value is not None and not key.startswith("lora_")}
    if path.is_file():
        model = _checkpoint(path, **given)
    elif path.is_dir():
        if not (path / ADAPTER_FILE).is_file():
            del given["model_name_or_path"]  # an export holds its own weights
        model = _ullme().from_pretrained(path, **given)
    else:
        raise ValueError(f"model_checkpoint {path} does not exist")
    for lora in getattr(model.backbone, "peft_config", {}).values():
        for key, trained in (("lora_r", lora.r), ("lora_alpha", lora.lora_alpha)):
            if arguments.get("lora_r") is not None and arguments[key] != trained:
                raise ValueError(f"{key} is {arguments[key]} but {path} was trained with {trained}")
    return model

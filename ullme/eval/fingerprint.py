"""What a cached score belongs to: a digest of the weights and of every setting that changes an embedding.

mteb files a result under the model's name and revision and reuses it for every later model of that name. A local
model has neither of its own (any ``SentenceTransformer(path)`` is "no_model_name/available"), so its revision is this
digest: other weights, pooling, template, length, dtype or attention give another revision, hence another file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

DIGEST_BYTES = 12


def digest(settings: Any) -> str:
    """Hexadecimal digest of anything JSON can write; mappings are compared without regard to their order."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def _tensor_digest(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    head = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
    if tensor.numel():
        head.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return head.hexdigest()


def fingerprint(module: nn.Module, settings: Mapping[str, Any]) -> str:
    """Digest of a module's parameters and buffers, bit for bit, and of ``settings``."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with ThreadPoolExecutor(max_workers=4) as pool:
        weights = sorted(pool.map(_tensor_digest, tensors.items()))
    return digest({"weights": weights, "settings": dict(settings)})


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary and rules; its padding and truncation, which a call sets, do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return digest(repr(tokenizer))
    rules = json.loads(backend.to_str())
    return digest({key: value for key, value in rules.items() if key not in ("padding", "truncation")})

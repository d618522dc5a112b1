"""Shared fixtures: a folder with a tiny random decoder and its tokenizer, made once for the session."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes (once) the folder of a tiny random model: ``backbone_folder("llama", num_hidden_layers=1)``."""
    made: dict[tuple, str] = {}

    def make(model_type: str = "llama", **overrides: object) -> str:
        key = (model_type, *sorted(overrides.items()))
        if key not in made:
            tokenizer = tiny_tokenizer()
            settings = {
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "initializer_range": 0.2,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | overrides)))
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_folder(backbone_folder: Callable[..., str]) -> str:
    return backbone_folder("llama")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data for development; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets (../shared/data) are not on this machine")
    return SHARED_DATA

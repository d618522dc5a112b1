"""Invariant 7, first half: the shared row [q][p1][p2]... gives the states of separate rows, or says that it cannot."""

from __future__ import annotations

import pytest
import torch
from families import families, states, tiny_config, tiny_model, tiny_models
from torch import Tensor
from transformers import PreTrainedModel

from ullme.models.attention import AttentionSwitch
from ullme.models.layout import mask_argument, shared_mask, supports_shared_layout

SHARED = """
    cohere falcon gemma gemma2 gemma3_text gpt2 gpt_neox gptj granite llama llama4_text mistral mixtral olmo2 opt phi
    phi3 qwen2 qwen3 smollm3 stablelm starcoder2"""
SEPARATE = {
    "bloom": "ALiBi of the 2-D mask",
    "mpt": "ALiBi by place",
    "gpt_neo": "a window by place",
    "jamba": "recurrent layers",
    "zaya": "convolutions over the row",
    "deepseek_v32": "an indexer picks among places",
}

QUERIES = [[31, 74, 52, 99, 120, 45, 88], [63, 140, 27]]
PASSAGES = [
    [[71, 110, 35, 42], [90, 91, 57, 66, 33], [28, 149]],
    [[101, 87, 76], [55], [64, 122, 47, 39, 80, 81, 25, 26]],
]


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings()(hidden).log_softmax(-1)


@torch.no_grad()
def largest_difference(model: PreTrainedModel) -> float:
    """Of log-probabilities from the prompt's end on, one padded batch of shared rows against one row at a time."""
    lengths = [len(q) + sum(map(len, p)) for q, p in zip(QUERIES, PASSAGES, strict=True)]
    ids = torch.zeros(2, max(lengths), dtype=torch.int64)
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    expected, places = [], []
    for row, (query, passages) in enumerate(zip(QUERIES, PASSAGES, strict=True)):
        at = 0
        for segment, tokens in enumerate([query, *passages]):
            inside = slice(at, at + len(tokens))
            start = len(query) if segment else 0
            ids[row, inside], segments[row, inside] = torch.tensor(tokens), segment
            positions[row, inside] = torch.arange(start, start + len(tokens))
            at = inside.stop
            if segment:
                alone = torch.tensor([query + tokens])
                expected.append(states(model, alone)[0, len(query) - 1 :])
                places += [(row, slice(len(query) - 1, len(query))), (row, inside)]
    hidden = states(model, ids, mask_argument(model, segments, positions), positions)
    got = torch.cat([hidden[place] for place in places])
    return (log_probabilities(model, got) - log_probabilities(model, torch.cat(expected))).abs().max().item()


def variants(model_type: str) -> list[PreTrainedModel]:
    """On sdpa and eager, with the family's own windows and with ones that the rows outreach."""
    config, models = tiny_config(model_type), tiny_models(model_type)
    for name, narrow in (("sliding_window", 3), ("attention_chunk_size", 4)):
        if hasattr(config, name):
            models += tiny_models(model_type, **{name: narrow})
    return models


def test_the_mask_on_a_hand_made_row() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    rows = ["100000", "110000", "111000", "111100", "110010", "000001"]
    assert shared_mask(segments, positions)[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]
    rows = ["100000", "110000", "011000", "001100", "010010", "000001"]
    assert shared_mask(segments, positions, window=2)[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]
    rows = ["100000", "110000", "001000", "001100", "000010", "000001"]
    assert shared_mask(segments, positions, chunk=2)[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]


@pytest.mark.parametrize("model_type", SHARED.split())
def test_a_shared_row_scores_as_separate_rows_do(model_type: str) -> None:
    for model in variants(model_type):
        assert largest_difference(model) < 1e-4
        assert supports_shared_layout(model)


@pytest.mark.parametrize("model_type", SEPARATE)
def test_families_that_cannot_say_so(model_type: str) -> None:
    assert not any(supports_shared_layout(model) for model in variants(model_type))


def test_alibi_and_flash_attention_take_separate_rows() -> None:
    assert not supports_shared_layout(tiny_model("falcon", alibi=True))
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not supports_shared_layout(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "mixtral", "llama4_text"])
def test_the_trial_works_in_half_precision(model_type: str, dtype: torch.dtype) -> None:
    assert supports_shared_layout(tiny_model(model_type, "eager").to(dtype))


def test_a_window_that_the_layers_do_not_read_is_noticed() -> None:
    assert not supports_shared_layout(tiny_model("llama", sliding_window=4096))


def test_a_bidirectional_model_is_told_apart() -> None:
    model = tiny_model("llama")
    with AttentionSwitch(model).bidirectional():
        assert not supports_shared_layout(model)


def test_the_trial_leaves_modes_and_random_state_alone() -> None:
    model = tiny_model("mistral", sliding_window=4096).train()
    state = torch.get_rng_state()
    assert supports_shared_layout(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.sliding_window == 4096
    assert all(module.training for module in model.modules())


@pytest.mark.sweep
def test_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    shared, separate, wrong = [], [], {}
    for model_type in families():
        models = variants(model_type)
        supported = [supports_shared_layout(model) for model in models]
        (shared if all(supported) else separate).append(model_type)
        differences = [largest_difference(model) for model, yes in zip(models, supported, strict=True) if yes]
        if max(differences, default=0) > 1e-4:
            wrong[model_type] = differences
    with capsys.disabled():
        print(f"\nshared-query rows: exact for {len(shared)} of {len(families())} decoder families")
        print(f"  separate rows: {' '.join(separate)}")
    assert not wrong
    assert len(shared) >= 80

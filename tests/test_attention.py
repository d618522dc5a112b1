"""Invariant 4: bidirectional, the last token moves the first state; causal, it does not. For every family.

The default tier takes 25 families; ``-m sweep`` takes every one that transformers can build and prints the count.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import transformers
from families import IDS, families, first_moves, relative, states, tiny_model, tiny_models
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ullme.models.attention import RECURRENT, AttentionSwitch, check_switch

REPRESENTATIVE = """
    bloom cohere falcon gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox gptj granite jamba llama mistral mixtral mpt
    olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2"""

CANNOT_TURN = {
    "cpmant": "its prefix mask is never causal",
    **dict.fromkeys(RECURRENT, "purely recurrent: there is no attention to turn"),
}
CANNOT_PASS = {
    "deepseek_v4": "compresses keys in groups that start at the edge of the batch, so that left padding shifts them",
}
if Version(transformers.__version__) < Version("5.23"):
    CANNOT_PASS["doge"] = "its sdpa path is not causal before transformers 5.23"
NO_CHECKPOINTING = {"ctrl", "gpt_neox_japanese", "jetmoe", "openai-gpt"}
# peft refuses Mamba's out_proj, and breaks a router that returns a tuple
NO_LORA = {"falcon_h1", "nemotron_h", "llama4_text", "phimoe"}


@torch.no_grad()
def turns(model: PreTrainedModel) -> None:
    """The invariant, there and back, without and with padding in the batch."""
    switch = AttentionSwitch(model)
    before = states(model, IDS)
    for padded in (False, True):
        with switch.bidirectional():
            assert first_moves(model, padded=padded) > 1e-3
        assert first_moves(model, padded=padded) < 1e-6
    assert torch.equal(states(model, IDS), before)


@torch.no_grad()
def ignores_padding(model: PreTrainedModel) -> None:
    """A row in a padded batch has the states that it has alone."""
    switch = AttentionSwitch(model)
    row = IDS[:1, :7]
    with switch.bidirectional():
        alone = states(model, row)[0]
        for inside in (slice(0, 7), slice(IDS.shape[1] - 7, IDS.shape[1])):  # padded right, padded left
            ids, mask = IDS.clone(), torch.ones_like(IDS)
            ids[1], mask[1] = 0, 0
            ids[1, inside], mask[1, inside] = row[0], 1
            assert relative(states(model, ids, mask)[1, inside], alone) < 1e-5


def survives_checkpointing(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """One graph of an embedding loss and a causal one has the same gradient when its layers are recomputed, whatever
    mode the model is in by then.
    """
    switch = AttentionSwitch(model)
    plain = mixed_gradient(model, switch, nullcontext())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for around_backward in (nullcontext(), switch.bidirectional(), switch.causal()):
        assert relative(mixed_gradient(model, switch, around_backward), plain) < 1e-5


def mixed_gradient(model: PreTrainedModel, switch: AttentionSwitch, around_backward: AbstractContextManager) -> Tensor:
    model.train().zero_grad()
    torch.manual_seed(0)  # dropout
    with switch.bidirectional():
        reps = states(model, IDS)[:, :5].mean(1)
    embedding_loss = (reps * torch.linspace(-1, 1, reps.shape[1])).sum()
    with switch.causal():
        logits = model(input_ids=IDS, use_cache=False).logits
    generation_loss = cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    with around_backward:
        (embedding_loss + generation_loss).backward()
    model.eval()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def with_lora(model: PreTrainedModel) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()


@pytest.mark.parametrize("model_type", REPRESENTATIVE.split())
def test_the_last_token_moves_the_first_state_only_in_bidirectional_mode(model_type: str) -> None:
    for model in tiny_models(model_type):
        turns(model)


@pytest.mark.parametrize("model_type", REPRESENTATIVE.split())
def test_a_padded_row_has_the_states_that_it_has_alone(model_type: str) -> None:
    for model in tiny_models(model_type):
        ignores_padding(model)


@pytest.mark.parametrize("model_type", sorted(set(REPRESENTATIVE.split()) - NO_CHECKPOINTING))
def test_recomputed_layers_keep_the_mode_of_their_forward(model_type: str) -> None:
    for model in tiny_models(model_type):
        survives_checkpointing(model)


def test_layers_recomputed_by_reentrant_checkpointing_keep_it_too() -> None:
    survives_checkpointing(tiny_model("llama"), use_reentrant=True)


@pytest.mark.parametrize("model_type", REPRESENTATIVE.split())
def test_the_switch_reaches_through_lora(model_type: str) -> None:
    model = with_lora(tiny_model(model_type, "eager"))
    switch = AttentionSwitch(model)
    check_switch(model, switch)
    assert not switch.active


@pytest.mark.sweep
def test_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    passed, failed = [], {}
    for model_type in families():
        if model_type in CANNOT_TURN | CANNOT_PASS:
            continue
        try:
            for model in tiny_models(model_type):
                turns(model)
                ignores_padding(model)
                if model_type not in NO_CHECKPOINTING:
                    survives_checkpointing(model)
            if model_type not in NO_LORA:
                lora = with_lora(tiny_model(model_type, "eager"))
                check_switch(lora, AttentionSwitch(lora))
            passed.append(model_type)
        except Exception as error:
            failed[model_type] = repr(error)[:300]
    with capsys.disabled():
        print(f"\nattention switch: {len(passed)} of {len(families())} decoder families pass, on sdpa and eager")
        for model_type, reason in sorted((CANNOT_TURN | CANNOT_PASS).items()):
            print(f"  not {model_type}: {reason}")
    assert not failed
    assert len(passed) >= 100

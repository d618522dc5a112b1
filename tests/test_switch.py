"""The switch itself: blocks, threads, other models, windows, attention kernels, and the check that refuses a model."""

from __future__ import annotations

import copy
import shutil
import threading
from typing import Any

import pytest
import torch
from families import IDS, first_moves, relative, states, tiny_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from ullme.models.attention import RECURRENT, AttentionSwitch, UnsupportedBackbone, check_switch, position_ids
from ullme.models.backbones import inner_decoder

CHUNKS_OF_FOUR = {"attention_chunk_size": 4, "layer_types": ["chunked_attention"] * 2, "no_rope_layers": [1, 1]}


def attributes(model: PreTrainedModel) -> list[dict[str, object]]:
    return [dict(vars(model.config)), *(dict(vars(module)) for module in model.modules())]


def test_blocks_nest() -> None:
    model = tiny_model("llama")
    switch = AttentionSwitch(model)
    with switch.bidirectional():
        with switch.bidirectional(), switch.causal():
            assert not switch.active
            assert not hasattr(model.config, "is_causal")
        assert switch.active
        assert model.config.is_causal is False
    assert not switch.active


def test_an_exception_inside_the_block_restores_the_model() -> None:
    model = tiny_model("llama")
    switch = AttentionSwitch(model)
    before = attributes(model)
    with pytest.raises(IndexError), switch.bidirectional():
        states(model, torch.tensor([[10**6]]))
    assert attributes(model) == before


@torch.no_grad()
def test_a_natively_bidirectional_configuration_stays_so() -> None:
    model = tiny_model("llama", is_causal=False)
    switch = AttentionSwitch(model)
    check_switch(model, switch)
    with switch.bidirectional():
        assert first_moves(model) > 1e-3
    assert first_moves(model) > 1e-3
    assert model.config.is_causal is False


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_other_models_notice_nothing(attn_implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = tiny_model("llama", attn_implementation)
    others = [
        tiny_model("llama", attn_implementation),
        tiny_model("llama4_text", attn_implementation, is_causal=False, **CHUNKS_OF_FOUR),
    ]
    mask = torch.ones_like(IDS)
    mask[1, -4:] = 0
    with monkeypatch.context() as untouched:
        for name, builder in (("sdpa", sdpa_mask), ("eager", eager_mask)):
            untouched.setitem(AttentionMaskInterface._global_mapping, name, builder)
        expected = [states(other, IDS, mask) for other in others]
    with AttentionSwitch(turned).bidirectional():
        got = [states(other, IDS, mask) for other in others]
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@torch.no_grad()
def test_threads_in_different_modes_do_not_disturb_each_other() -> None:
    model = tiny_model("llama")
    switch = AttentionSwitch(model)
    blocks = {"bidirectional": switch.bidirectional, "causal": switch.causal}
    expected, wrong = {}, []
    for name, block in blocks.items():
        with block():
            expected[name] = states(model, IDS)

    def work(name: str) -> None:
        with torch.no_grad():
            for _ in range(50):
                with blocks[name]():
                    if not torch.equal(states(model, IDS), expected[name]):
                        wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copied_model_has_a_switch_of_its_own() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    twin, switch = copy.deepcopy((model, AttentionSwitch(model)))
    with torch.no_grad(), switch.bidirectional():
        assert first_moves(twin) > 1e-3
        assert first_moves(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_window_reaches_as_far_to_the_right_as_to_the_left(attn_implementation: str) -> None:
    window, layers, changed = 2, 2, 5
    model = tiny_model("mistral", attn_implementation, sliding_window=window, num_hidden_layers=layers)
    ids = IDS.clone()
    ids[1] = ids[0]
    ids[1, changed] = 35
    with AttentionSwitch(model).bidirectional():
        first, second = states(model, ids)
    reached = (first - second).abs().amax(-1) > 1e-6
    assert reached.nonzero().flatten().tolist() == list(range(changed - window * layers, changed + window * layers + 1))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("left_padding", [0, 3])
def test_a_chunk_is_seen_whole_and_no_other(attn_implementation: str, left_padding: int) -> None:
    model = tiny_model("llama4_text", attn_implementation, **CHUNKS_OF_FOUR)
    ids = torch.cat([torch.zeros(2, left_padding, dtype=torch.int64), IDS[:1].repeat(2, 1)], dim=1)
    ids[1, left_padding + 6] = 35
    mask = (torch.arange(ids.shape[1]) >= left_padding).long().repeat(2, 1)
    with AttentionSwitch(model).bidirectional():
        first, second = states(model, ids, mask)
    reached = (first - second).abs().amax(-1)[left_padding:] > 1e-6
    assert reached.nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("model_type", sorted(RECURRENT))
def test_recurrent_families_are_refused_by_name(model_type: str) -> None:
    model = tiny_model(model_type, "eager")
    with pytest.raises(UnsupportedBackbone, match=f"{model_type} is purely recurrent"):
        check_switch(model, AttentionSwitch(model))


def test_a_family_that_is_never_causal_is_refused_by_name() -> None:
    model = tiny_model("cpmant", "eager")
    with pytest.raises(UnsupportedBackbone, match=r"cpmant .* does not turn"):
        check_switch(model, AttentionSwitch(model))


class HardCausal(PreTrainedModel):
    """Attention with the triangle written into its code, as remote code may have it; it draws random numbers too."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: object) -> BaseModelOutput:
        x = self.embed_tokens(input_ids) * (1 + torch.rand(()))
        return BaseModelOutput(last_hidden_state=x + scaled_dot_product_attention(x, x, x, is_causal=True))


def test_a_model_that_silently_stays_causal_is_refused_by_name() -> None:
    model = HardCausal(LlamaConfig(vocab_size=160, hidden_size=32)).train()
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedBackbone, match=r"llama .* does not turn"):
        check_switch(model, AttentionSwitch(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_the_check_leaves_modes_and_random_state_alone(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type).to(dtype).train()
    inner_decoder(model).eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    switch = AttentionSwitch(model)
    check_switch(model, switch)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not switch.active


def test_positions_do_not_depend_on_the_side_of_the_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]


def flash_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None) -> Tensor:
    """What FlashAttention computes, in plain PyTorch: q [b, L, heads, d], k and v [b, L, key heads, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash_kernel_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    rows = zip(*(x.tensor_split(cu_seqlens_k[1:-1].long()) for x in (q, k, v)), strict=True)
    return torch.cat([flash_kernel(*(x[None] for x in row), **options)[0] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi3", "gpt_neox", "opt"])
def test_flash_attention_is_told_the_mode(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of transformers to FlashAttention-2, with the kernel that needs a GPU replaced by a plain one."""
    kernels = (flash_kernel, flash_kernel_varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: kernels)
    model, reference = tiny_model(model_type), tiny_model(model_type, "eager")
    model.config._attn_implementation = "flash_attention_2"
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for padding in (None, mask):
        inside = torch.ones_like(IDS).bool() if padding is None else padding.bool()
        with AttentionSwitch(model).bidirectional(), AttentionSwitch(reference).bidirectional():
            assert relative(states(model, IDS, padding)[inside], states(reference, IDS, padding)[inside]) < 1e-5
        assert relative(states(model, IDS, padding)[inside], states(reference, IDS, padding)[inside]) < 1e-5


@torch.no_grad()
def test_a_compiled_model_follows_the_switch() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    switch, plain_switch = AttentionSwitch(model), AttentionSwitch(plain)
    model.model.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(states(model, IDS), states(plain, IDS))
        with switch.bidirectional(), plain_switch.bidirectional():
            assert torch.equal(states(model, IDS), states(plain, IDS))


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention compiles its mask with g++ on a CPU")
@torch.no_grad()
def test_flex_attention_turns() -> None:
    model = tiny_model("llama")
    switch = AttentionSwitch(model)
    with switch.bidirectional():
        expected = states(model, IDS)
    model.set_attn_implementation("flex_attention")
    with switch.bidirectional():
        assert relative(states(model, IDS), expected) < 1e-5
    assert first_moves(model) < 1e-6

"""Tiny random models of every decoder family that transformers can build.

``tiny_model("llama")`` is a causal LM of two layers, width 32 and 160 tokens, with the same weights on every call.
The configuration of any family shrinks by one table of field names (``SHRUNK``); a list with one entry per layer is cut
to one entry of each kind, so that a hybrid keeps both kinds of its layers. ``FIXES`` holds what a table cannot know.
``states`` and ``first_moves`` measure such a model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ullme.models.attention import position_ids
from ullme.models.backbones import accepted, inner_decoder

VOCABULARY = 160
IDS = torch.tensor([31, 74, 52, 99, 120, 45, 88, 63, 140, 27, 71, 110]).repeat(2, 1)
IDS[1, -1] = 35  # two rows that differ in the last token

SHRUNK: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "dim_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "dim_head"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),  # at this width 0.02 would hide what tokens do to others
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

NOT_DECODERS = {
    "encoders with a causal head": """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert roberta
        roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod""",
    "decoders of translation, speech, music and vision models": """
        bart bigbird_pegasus blenderbot blenderbot-small git marian mbart mllama moshi musicgen musicgen_melody mvp
        pegasus plbart prophetnet trocr whisper""",
    "multimodal wrappers of a text decoder that has its own entry": """
        dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 moss_transcribe_diarize
        phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp""",
    "drafters that read the states of another model": "gemma4_assistant gemma4_unified_assistant",
    "bytes in patches: the attention is over patches": "blt",
}

FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "shared_experts_intermediate_size": 32,
        **dict.fromkeys(("swa_head_dim", "swa_q_lora_rank", "swa_kv_lora_rank"), 16),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {"rel_extent": 16, "d_rel": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "inkling2_text": {"rel_extent": 16, "d_rel": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "indexer_head_dim", "hc_lowrank"), 8),
        **{"indexer_kv_heads": 1, "indexer_budget": 64, "indexer_compress_ratio": 4},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


@cache
def families() -> tuple[str, ...]:
    """Every decoder family of the causal-LM mapping, sorted."""
    others = {name for names in NOT_DECODERS.values() for name in names.split()}
    return tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - others))


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of ``model_type``, shrunk; ``overrides`` win."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    fields |= {name: getattr(default, name, None) for name in default.attribute_map}
    fields = {name: value for name, value in fields.items() if not _read_only(kind, name)}
    shrunk = {name: value for name, value in SHRUNK.items() if name in fields}
    if "kv_lora_rank" in shrunk:  # latent attention has one key per query head
        shrunk["num_key_value_heads"] = shrunk["num_attention_heads"]
    depth = len(fields.get("layer_types") or ())
    if depth:
        kinds = list(dict.fromkeys(fields["layer_types"]))
        picked = [fields["layer_types"].index(k) for k in kinds] if len(kinds) > 1 else [0, depth - 1]
        for name, value in fields.items():
            if name not in default.attribute_map and isinstance(value, (list, tuple)) and len(value) == depth:
                shrunk[name] = [value[i] for i in picked]
        shrunk["num_hidden_layers"] = len(picked)
    return kind(**(shrunk | FIXES.get(model_type, {}) | overrides))


def _read_only(kind: type[PreTrainedConfig], name: str) -> bool:
    return isinstance(getattr(kind, kind.attribute_map.get(name, name), None), property)


def tiny_model(model_type: str, attn_implementation: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A causal LM of ``model_type`` with seeded random weights, float32, in eval mode."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model.eval()


def tiny_models(model_type: str, **overrides: Any) -> list[PreTrainedModel]:
    """One model for each of sdpa and eager that the family has."""
    eager = tiny_model(model_type, "eager", **overrides)
    return [tiny_model(model_type, "sdpa", **overrides), eager] if eager._supports_sdpa else [eager]


def states(model: PreTrainedModel, ids: Tensor, mask: Any = None, positions: Tensor | None = None) -> Tensor:
    """Last hidden states [b, L, D]; ``mask`` is what the decoder takes, default all ones."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = position_ids(mask) if positions is None else positions
    decoder = inner_decoder(model)
    return decoder(**accepted(decoder, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False))[0]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def first_moves(model: PreTrainedModel, *, padded: bool = False) -> float:
    """How far another last token moves the first state; ``padded`` adds a shorter row to the batch."""
    ids = torch.cat([IDS, IDS[:1]])
    mask = torch.ones_like(ids)
    mask[2, IDS.shape[1] // 2 :] = not padded
    first = states(model, ids, mask)[:2, 0]
    return relative(first[1], first[0])

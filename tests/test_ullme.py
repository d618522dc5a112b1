"""The model: listing 1 runs as printed; neighbours, padding and batch size change no embedding; exports open as it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from ullme.data.template import Template
from ullme.models import ULLME
from ullme.models.pooling import POOLINGS

TEXTS = ["fox", "the hen sleeps in the red barn", "how many years?", "A decoder reads from left to right. " * 4]


def moved(model: ULLME) -> ULLME:
    """The same model after some training, as far as its weights can tell."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_listing_1(tiny_folder):
    model = ULLME(
        model_name_or_path=tiny_folder,
        model_backbone_type="llama",
        lora_name="ullme-llama",
        lora_r=16,
        lora_alpha=32,
    )
    inputs = model.tokenizer(["This a example sentence."], return_tensors="pt")
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], is_generate=False)
    assert output["rep"].shape == (1, model.dim) == (1, 32)
    generated = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], is_generate=True)
    with torch.no_grad(), model.reference():
        torch.testing.assert_close(generated.logits, model.base(**inputs).logits)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_neighbours_and_padding_change_nothing(tiny_folder, pooling, side):
    model = ULLME(tiny_folder, pooling=pooling).eval()
    model.tokenizer.padding_side = side
    batch = model.tokenizer(TEXTS, return_tensors="pt", padding=True)
    together = model(batch["input_ids"], batch["attention_mask"])["rep"]
    for text, rep in zip(TEXTS, together, strict=True):
        alone = model.tokenizer([text], return_tensors="pt")
        torch.testing.assert_close(model(**alone)["rep"][0], rep, atol=1e-5, rtol=1e-4)


def test_encode_keeps_the_order_and_ignores_the_batch(tiny_folder):
    model = ULLME(tiny_folder)
    together = model.encode(TEXTS, kind="passage")
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    for budget in (1, 30):
        np.testing.assert_allclose(model.encode(TEXTS, batch_tokens=budget), together, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS[::-1])[::-1], together, atol=1e-6)
    assert model.training is False
    assert model.encode([]).shape == (0, 32)


def test_embedding_is_bidirectional_unless_told_otherwise(tiny_folder):
    for attention, changes in (("bidirectional", True), ("causal", False)):
        model = ULLME(tiny_folder, pooling="first", attention=attention)
        ids = torch.tensor([[1, 40, 50, 60], [1, 40, 50, 61]])
        first, second = model(ids, torch.ones_like(ids))["rep"]
        assert (not torch.equal(first, second)) == changes


def test_generation_is_causal_and_unmoved_by_embedding(tiny_folder):
    model = ULLME(tiny_folder)
    before = model.generate(["the red", "how"], max_new_tokens=6, do_sample=False)
    model.encode(TEXTS)
    assert model.generate(["the red", "how"], max_new_tokens=6, do_sample=False) == before
    assert model.generate(["how"], max_new_tokens=6, do_sample=False) == before[1:]


def test_the_instruction_may_stay_outside_the_pooling(tiny_folder):
    inside = ULLME(tiny_folder).encode(["the fox"], kind="query", normalize=False)
    model = ULLME(tiny_folder, pool_instruction=False).eval()
    outside = model.encode(["the fox"], kind="query", normalize=False)
    assert not np.allclose(inside, outside)
    ids, skip = model.texts.queries(["the fox"])
    tensor = torch.tensor(ids)
    with torch.no_grad(), model.switch.bidirectional():
        states = model.base.model(tensor, attention_mask=torch.ones_like(tensor)).last_hidden_state[0]
    np.testing.assert_allclose(outside[0], states[skip[0] :].mean(0).numpy(), atol=1e-5)
    np.testing.assert_allclose(inside[0], states.mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "phi3"])
def test_every_family_takes_an_adapter_without_being_told_where(backbone_folder, family, dtype):
    model = ULLME(backbone_folder(family), lora_r=4, dtype=dtype)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) >= 2 * 4
    assert not any("lm_head" in name or "embed_out" in name for name in adapted)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert model.base.dtype == getattr(torch, dtype)
    model.train()
    ids = torch.tensor([[1, 40, 50, 60]])
    model(ids, torch.ones_like(ids))["rep"].square().sum().backward()
    assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "options", [{"lora_r": 4, "lora_name": "mine"}, {}, {"pooling": "last"}, {"attention": "causal"}]
)
def test_export_opens_everywhere_as_the_model_it_was(tiny_folder, tmp_path, options):
    model = moved(ULLME(tiny_folder, template=Template(instruction="Find it"), **options))
    folder = model.save_pretrained(tmp_path / "export")
    queries, passages = model.encode(TEXTS, kind="query"), model.encode(TEXTS)
    reopened = ULLME.from_pretrained(folder)
    assert reopened.settings() == model.settings()
    np.testing.assert_allclose(reopened.encode(TEXTS, kind="query"), queries, atol=1e-5)
    sentences = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(sentences.encode(TEXTS, prompt_name="query"), queries, atol=1e-5)
    np.testing.assert_allclose(sentences.encode(TEXTS), passages, atol=1e-5)
    if "lora_r" in options:
        over_base = ULLME.from_pretrained(folder / "adapter")
        np.testing.assert_allclose(over_base.encode(TEXTS), passages, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config.get("is_causal") is (None if options.get("attention") == "causal" else False)
    prompt = ["the hen"]
    assert reopened.generate(prompt, max_new_tokens=5, do_sample=False) == model.generate(
        prompt, max_new_tokens=5, do_sample=False
    )


def test_export_ends_texts_as_the_template_does(tiny_folder, tmp_path):
    model = ULLME(tiny_folder, pooling="last", template=Template(append_eos=True))
    folder = model.save_pretrained(tmp_path / "export")
    sentences = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(sentences.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ULLME.from_pretrained(folder).encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_export_leaves_other_folders_alone(tiny_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no export"):
        ULLME(tiny_folder).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "unknown pooling 'max'"),
        ({"attention": "both"}, "unknown attention 'both'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"model_backbone_type": "mistral"}, "model_backbone_type is 'mistral' but .* is a 'llama'"),
        ({"max_passage_length": 4096}, "max_passage_length is 4096 but .* reads at most 1024 tokens"),
    ],
)
def test_bad_options_are_named(tiny_folder, options, message):
    with pytest.raises(ValueError, match=message):
        ULLME(tiny_folder, **options)


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match=r"cannot load 'no-such/model': .*no network"):
        ULLME("no-such/model")


def test_four_bit_without_bitsandbytes(tiny_folder):
    with pytest.raises(ValueError, match="load_in_4bit needs the package bitsandbytes"):
        ULLME(tiny_folder, load_in_4bit=True)


def test_recurrent_models_are_refused_by_name(tmp_path):
    from families import tiny_model
    from tiny import tiny_tokenizer

    folder = Path(tmp_path)
    tiny_model("mamba", "eager").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="mamba"):
        ULLME(str(folder))


def test_encode_refuses_what_it_would_misread(tiny_folder):
    model = ULLME(tiny_folder)
    with pytest.raises(TypeError, match="wrap it in a list"):
        model.encode("one text")
    with pytest.raises(ValueError, match="choose query or passage"):
        model.encode(["a"], kind="document")
    with pytest.raises(ValueError, match=r"1.*(empty|white)"):
        model.encode(["a", "  "])

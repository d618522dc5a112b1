"""What the template promises.

- one rendering of a query, a passage and a prompt; "" drops the instruction; a malformed template is refused
- skip counts exactly the tokens before the text, for byte-level, metaspace and newline-merging tokenizers
- a text that is too long is cut, never the template or the special tokens, and never all of the text
- <bos> and <eos> appear as the tokenizer adds them, never twice; prompts and targets never end in one
- ids do not depend on the neighbours in the batch, on the padding side, or on what the tokenizer was told before
"""

from __future__ import annotations

import re

import pytest
from tiny import SENTENCES, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ullme.data import template as template_module
from ullme.data.template import Template, TemplateTokenizer

TEXTS = ["cat", "which fox is it?", "naïve café 日本語 🦊", " a leading space", "{text} {instruction}", "two\nlines"]
INSTRUCTION = "Find the fox"


def trained(pre_tokenizer, decoder, normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() + sorted(set("".join(SENTENCES + TEXTS)))
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SENTENCES, "?\n.\n" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def merging_newlines() -> PreTrainedTokenizerFast:
    """Punctuation takes the newlines after it into its token, as in Llama-3."""
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+[\r\n]*|\s+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(pre_tokenizers.Sequence([words, byte_level]), decoders.ByteLevel())


def metaspace() -> PreTrainedTokenizerFast:
    """Words begin with a mark for the space before them, as in Mistral."""
    return trained(pre_tokenizers.Metaspace(), decoders.Metaspace())


TOKENIZERS = {
    "bos": tiny_tokenizer,
    "bare": lambda: tiny_tokenizer(bos=False),
    "bos and eos": lambda: tiny_tokenizer(eos=True),
    "newlines": merging_newlines,
    "metaspace": metaspace,
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_defaults_are_those_of_e5_mistral() -> None:
    template = Template()
    assert template.render_query("a fox?", INSTRUCTION) == "Instruct: Find the fox\nQuery: a fox?"
    assert template.render_query("a fox?") == f"Instruct: {template.instruction}\nQuery: a fox?"
    assert template.render_passage("A fox.") == "A fox."
    assert template.render_prompt("a fox?", INSTRUCTION) == "Instruct: Find the fox\nQuery: a fox?\nPassage:\n"


def test_empty_instruction_drops_its_line() -> None:
    assert Template().render_query("a fox?", "") == "Query: a fox?"
    assert Template().render_prompt("a fox?", "") == "Query: a fox?\nPassage:\n"
    assert Template(query="<|user|>\n{instruction}\n<|embed|>\n{text}").render_query("x", "") == (
        "<|user|>\n<|embed|>\nx"
    )
    assert Template(query="{instruction} {text}").render_query("x", "") == "x"


def test_braces_of_texts_and_of_templates_stay() -> None:
    template = Template(query='{{"q": "{text}"}}')
    assert template.render_query("{text} {0}") == '{"q": "{text} {0}"}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "Query:"}, r"template\.query .* must hold \{text\} exactly once"),
        ({"query": "{text} {text}"}, "exactly once"),
        ({"query": "{query} {text}"}, r"placeholder \{query\}; it may hold only \{text\} and \{instruction\}"),
        ({"passage": "{instruction} {text}"}, r"placeholder \{instruction\}; it may hold only \{text\}"),
        ({"prompt": "{text!r}"}, r"placeholder \{text!r\}"),
        ({"prompt": "{text:>9}"}, r"placeholder \{text:>9\}"),
        ({"query": "{text} {}"}, r"placeholder \{\}"),
        ({"query": "{text} {"}, r"template\.query .* for literal braces"),
    ],
)
def test_malformed_templates_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(**fields)


def test_a_template_survives_its_dict() -> None:
    template = Template(query="{text}", append_eos=True)
    assert Template.from_dict(template.to_dict()) == template
    with pytest.raises(ValueError, match="no field postfix; its fields are query, passage"):
        Template.from_dict({"postfix": ""})


def test_ids_decode_to_the_rendering(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template()
    texts = TemplateTokenizer(tokenizer, template, 1000, 1000)
    renderings = {
        "queries": (texts.queries(TEXTS, INSTRUCTION)[0], [template.render_query(t, INSTRUCTION) for t in TEXTS]),
        "passages": (texts.passages(TEXTS)[0], TEXTS),
        "prompts": (texts.prompts(TEXTS, INSTRUCTION), [template.render_prompt(t, INSTRUCTION) for t in TEXTS]),
        "targets": (texts.targets(TEXTS), TEXTS),
    }
    for kind, (rows, expected) in renderings.items():
        for ids, text in zip(rows, expected, strict=True):
            assert decode(tokenizer, ids).lstrip() == text.lstrip(), kind


@pytest.mark.parametrize(
    "query", ["Query: {text}", "Instruct: {instruction}\nQuery: {text}", "{instruction}\n{text}\n"]
)
def test_skip_ends_where_the_text_begins(tokenizer: PreTrainedTokenizerFast, query: str) -> None:
    template = Template(query=query)
    rows, skips = TemplateTokenizer(tokenizer, template, 1000).queries(TEXTS, INSTRUCTION)
    for text, ids, skip in zip(TEXTS, rows, skips, strict=True):
        before, after = template.around("query", INSTRUCTION)
        assert before.startswith(decode(tokenizer, ids[:skip])), "no character of the text is skipped"
        rest = decode(tokenizer, ids[skip:])
        assert rest.strip() == (text + after).strip(), "and nothing else is left but the text"


def test_skip_is_zero_where_nothing_stands_before_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = TemplateTokenizer(tokenizer, Template())
    assert texts.passages(TEXTS)[1] == [0] * len(TEXTS)
    assert TemplateTokenizer(tokenizer, Template(query="{text}")).queries(TEXTS)[1] == [0] * len(TEXTS)


@pytest.mark.parametrize("limit", range(20, 60, 3))
@pytest.mark.parametrize("append_eos", [False, True])
def test_only_the_text_is_cut(tokenizer: PreTrainedTokenizerFast, limit: int, append_eos: bool) -> None:
    template = Template(
        query="Q: {text}", passage="P: {text} :P", prompt="Q: {text}\nPassage:\n", append_eos=append_eos
    )
    texts = TemplateTokenizer(tokenizer, template, limit, limit)
    whole = TemplateTokenizer(tokenizer, template, 10_000, 10_000)
    long = [text + " " + "the quick brown fox? jumps over the lazy dog. 日本\n" * 9 for text in TEXTS]
    for kind, rows, uncut in (
        ("query", texts.queries(long)[0], whole.queries(long)[0]),
        ("passage", texts.passages(long)[0], whole.passages(long)[0]),
        ("prompt", texts.prompts(long), whole.prompts(long)),
    ):
        before, after = template.around(kind)
        for text, ids, all_ids in zip(long, rows, uncut, strict=True):
            assert len(ids) == limit < len(all_ids)
            tail = len(ids)
            while ids[:tail] != all_ids[:tail]:
                tail -= 1
            assert ids[tail:] == all_ids[len(all_ids) - (limit - tail) :], "one run of tokens is missing"
            kept = decode(tokenizer, ids)
            assert kept.lstrip().startswith(before.lstrip()), kind
            assert kept.endswith(after), kind
            body = kept.lstrip()[len(before.lstrip()) : len(kept.lstrip()) - len(after)].strip()
            body = body.rstrip("�").rstrip("?.")  # half a character; a full stop that shares its token with \n
            assert body, kind
            assert text.strip().startswith(body), kind


@pytest.mark.parametrize("limit", [3, 8, 512])
def test_a_bare_passage_is_cut_as_the_tokenizer_cuts(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    long = [text + " and the quick brown fox" * 3 for text in TEXTS]
    rows, _ = TemplateTokenizer(tokenizer, Template(), max_passage_length=limit).passages(long)
    assert rows == tokenizer(long, truncation=True, max_length=limit)["input_ids"]


def test_a_limit_without_room_for_the_text_says_by_how_much(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(query="Query: {text} :end", append_eos=True)
    with pytest.raises(ValueError, match="max_query_length is too small for query 0 of 1") as refusal:
        TemplateTokenizer(tokenizer, template, 3).queries(["fox and hen"])
    missing = int(re.search(r"by (\d+) or more", str(refusal.value)).group(1))
    rows, _ = TemplateTokenizer(tokenizer, template, 3 + missing).queries(["fox and hen"])
    assert len(rows[0]) == 3 + missing
    with pytest.raises(ValueError, match="by 1 or more"):
        TemplateTokenizer(tokenizer, template, 2 + missing).queries(["fox and hen"])


def test_special_tokens_are_never_doubled() -> None:
    for bos in (False, True):
        for eos in (False, True):
            for append_eos in (False, True):
                tokenizer = tiny_tokenizer(bos=bos, eos=eos)
                texts = TemplateTokenizer(tokenizer, Template(append_eos=append_eos))
                for ids in (*texts.queries(TEXTS)[0], *texts.passages(TEXTS)[0]):
                    assert ids.count(tokenizer.bos_token_id) == int(bos)
                    assert ids.count(tokenizer.eos_token_id) == int(eos or append_eos)
                    assert (ids[0] == tokenizer.bos_token_id) == bos
                    assert (ids[-1] == tokenizer.eos_token_id) == (eos or append_eos)
                for ids in texts.prompts(TEXTS):
                    assert (ids[0] == tokenizer.bos_token_id) == bos
                    assert tokenizer.eos_token_id not in ids
                for ids in texts.targets(TEXTS):
                    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)


@pytest.mark.parametrize("passage", ["{text}", "passage: {text}"])
@pytest.mark.parametrize("limit", [5, 12, 512])
def test_targets_are_the_tokens_of_the_bare_text(tokenizer: PreTrainedTokenizerFast, passage: str, limit: int) -> None:
    template = Template(passage=passage, append_eos=True)
    short = passage == "{text}"
    texts = TemplateTokenizer(tokenizer, template, max_passage_length=limit if short else limit + 20)
    ids, skips, targets = texts.passages_and_targets(TEXTS)
    assert (ids, skips) == texts.passages(TEXTS)
    assert targets == texts.targets(TEXTS)
    bare = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert all(target and row[: len(target)] == target for target, row in zip(targets, bare, strict=True))


def test_one_instruction_for_all_or_one_for_each() -> None:
    texts = TemplateTokenizer(tiny_tokenizer(), Template())
    each = texts.queries(["cat", "hen"], ["Find a cat", None])
    assert each[0][0] == texts.queries(["cat"], "Find a cat")[0][0]
    assert each[0][1] == texts.queries(["hen"])[0][0]
    with pytest.raises(ValueError, match="got 1 instructions for 2 texts"):
        texts.queries(["cat", "hen"], ["Find a cat"])


def test_ids_do_not_depend_on_neighbours(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TemplateTokenizer(tokenizer, Template(), 40, 6)
    together = [texts.queries(TEXTS), texts.passages(TEXTS), (texts.prompts(TEXTS), texts.targets(TEXTS))]
    monkeypatch.setattr(template_module, "_TOKENIZE_AT_ONCE", 2)
    for i, text in enumerate(TEXTS):
        alone = [texts.queries([text]), texts.passages([text]), (texts.prompts([text]), texts.targets([text]))]
        assert alone == [([first[i]], [second[i]]) for first, second in together]
    assert [texts.queries(TEXTS), texts.passages(TEXTS)] == together[:2]


def test_ids_do_not_depend_on_the_padding_side_or_on_earlier_settings() -> None:
    left, right = tiny_tokenizer(padding_side="left"), tiny_tokenizer(padding_side="right")
    left(TEXTS, padding="max_length", truncation=True, max_length=4)
    expected = TemplateTokenizer(right, Template()).queries(TEXTS)
    assert TemplateTokenizer(left, Template()).queries(TEXTS) == expected


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_an_empty_text_is_named(empty: str) -> None:
    texts = TemplateTokenizer(tiny_tokenizer(), Template())
    with pytest.raises(ValueError, match="query 1 of 2 is empty"):
        texts.queries(["cat", empty])
    with pytest.raises(ValueError, match="passage 2 of 3 is empty"):
        texts.passages(["cat", "hen", empty])
    with pytest.raises(ValueError, match="passage 0 of 1 is empty"):
        texts.targets([empty])
    with pytest.raises(ValueError, match="prompt 0 of 1 is empty"):
        texts.prompts([empty])


def test_a_text_that_the_tokenizer_drops_is_named() -> None:
    tokenizer = trained(pre_tokenizers.ByteLevel(False), decoders.ByteLevel(), normalizers.Replace("\u200b", ""))
    texts = TemplateTokenizer(tokenizer, Template())
    with pytest.raises(ValueError, match="passage 1 of 2 has no tokens"):
        texts.passages(["cat", "\u200b"])
    with pytest.raises(ValueError, match="query 0 of 1 has no tokens"):
        texts.queries(["\u200b"])
    with pytest.raises(ValueError, match="prompt 0 of 1 has no tokens"):
        texts.prompts(["\u200b"])
    rows, skips = texts.queries(["\u200bcat"])
    assert decode(tokenizer, rows[0][skips[0] :]) == " cat", "a dropped character in front moves no border"


def test_misuse_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"ByT5Tokenizer of .* is a slow tokenizer"):
        TemplateTokenizer(ByT5Tokenizer(), Template())
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(ValueError, match=r"append_eos is true, but the tokenizer .* has no eos_token"):
        TemplateTokenizer(without_eos, Template(append_eos=True))
    with pytest.raises(TypeError, match="expected a list of query texts, got the single string 'cat'"):
        TemplateTokenizer(tiny_tokenizer(), Template()).queries("cat")

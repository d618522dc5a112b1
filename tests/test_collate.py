"""What the collator promises.

- cell [i, j] decodes to text (i, j), in any batch, ragged or not; what is empty is masked
- N is 1 + negatives whatever the rows hold
- a text has one identity wherever it stands, and all positives of a row are named
- a text that recurs is tokenised once
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer

from ullme.data.collate import Collator
from ullme.data.rows import text_hash
from ullme.data.template import Template, TemplateTokenizer
from ullme.data.triples import Triple, TripleBatches, TripleSet

TRIPLES = [
    Triple("which fox?", "The quick brown fox.", ["A lazy dog.", "A red barn."], ["The quick brown fox."]),
    Triple("who slept", "The hen, in the barn.", [], ["The cat.", "The hen, in the barn."], "Find the sleeper"),
    Triple(
        "what colour is it?", "A  red barn.", ["The quick brown fox.", "日本 🦊", "A lazy dog."], ["A  red barn."], ""
    ),
    Triple("which fox?", "A lazy dog.", ["The cat."], ["A lazy dog."], None, False),
]


@pytest.fixture
def texts() -> TemplateTokenizer:
    return TemplateTokenizer(tiny_tokenizer(), Template(passage="passage: {text}", append_eos=True))


def cell_texts(triple: Triple) -> list[str]:
    return [triple.positive, *triple.negatives]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 1]])
def test_cell_i_j_decodes_to_text_i_j(texts: TemplateTokenizer, order: list[int]) -> None:
    triples = [TRIPLES[i] for i in order]
    batch = Collator(texts, negatives=3)(triples)
    decode = texts.tokenizer.decode
    assert (
        batch.passages.shape == batch.targets.shape == batch.mask.shape == batch.passage_skip.shape == (len(order), 4)
    )
    for i, triple in enumerate(triples):
        assert decode(batch.queries[i]) == f"<bos>{texts.template.render_query(triple.query, triple.instruction)}<eos>"
        assert decode(batch.prompts[i]) == f"<bos>{texts.template.render_prompt(triple.query, triple.instruction)}"
        assert decode(batch.queries[i][batch.query_skip[i] :]) == f" {triple.query}<eos>"
        for j, text in enumerate(cell_texts(triple)):
            assert decode(batch.passages[i, j]) == f"<bos>passage: {text}<eos>"
            assert decode(batch.passages[i, j][batch.passage_skip[i, j] :]).strip() == f"{text}<eos>"
            assert decode(batch.targets[i, j]) == text
        n = len(cell_texts(triple))
        assert batch.mask[i].tolist() == [True] * n + [False] * (4 - n)


def test_empty_cells_hold_nothing(texts: TemplateTokenizer) -> None:
    batch = Collator(texts, negatives=8)(TRIPLES)
    assert batch.mask.shape == (4, 9)
    for values in (batch.passages.lengths, batch.targets.lengths, batch.passage_hash, batch.passage_skip):
        assert (values[~batch.mask] == 0).all()
        assert (values[batch.mask] != 0).all()


def test_hashes_name_texts(texts: TemplateTokenizer) -> None:
    batch = Collator(texts, negatives=3)(TRIPLES)
    assert batch.query_hash.tolist() == [text_hash(triple.query) for triple in TRIPLES]
    assert batch.query_hash[0] == batch.query_hash[3]
    for i, triple in enumerate(TRIPLES):
        expected = [text_hash(text) for text in cell_texts(triple)]
        assert batch.passage_hash[i].tolist() == expected + [0] * (4 - len(expected))
        positives = [text_hash(text) for text in triple.positives]
        assert batch.positive_hash[i].tolist() == positives + [0] * (2 - len(positives))
    assert batch.passage_hash[0, 2] == batch.passage_hash[2, 0], "white space makes no other text"
    assert batch.in_batch_negatives.tolist() == [True, True, True, False]
    assert batch.query_hash.dtype == batch.passage_hash.dtype == batch.positive_hash.dtype == torch.int64
    assert batch.mask.dtype == batch.in_batch_negatives.dtype == torch.bool


def test_a_recurring_passage_is_tokenised_once() -> None:
    seen: list[str] = []

    class Listening(TemplateTokenizer):
        def passages(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
            seen.extend(texts)
            return super().passages(texts)

    Collator(Listening(tiny_tokenizer(), Template()), negatives=3)(TRIPLES)
    assert len(seen) == len(set(seen)) == len({text for triple in TRIPLES for text in cell_texts(triple)})


def test_without_generation_nothing_is_prompted(texts: TemplateTokenizer) -> None:
    whole, embedding = Collator(texts, 3)(TRIPLES), Collator(texts, 3, needs_generation=False)(TRIPLES)
    assert torch.equal(whole.passages.tokens, embedding.passages.tokens)
    assert embedding.prompts.shape == (4,)
    assert embedding.targets.shape == (4, 4)
    assert not embedding.prompts.lengths.any()
    assert not embedding.targets.lengths.any()


def test_a_row_without_cells_for_its_negatives_is_refused(texts: TemplateTokenizer) -> None:
    with pytest.raises(ValueError, match="got 3 negatives for a query, expected at most 2"):
        Collator(texts, negatives=2)(TRIPLES)
    assert Collator(texts, negatives=0)([TRIPLES[1]]).mask.shape == (1, 1)


def test_a_batch_moves_as_a_whole(texts: TemplateTokenizer) -> None:
    batch = Collator(texts, negatives=3)(TRIPLES).to("meta")
    assert len(batch) == 4
    assert {value.device.type for value in (batch.queries.tokens, batch.targets.lengths, batch.mask)} == {"meta"}


@pytest.mark.parametrize("name", ["msmarco/train.jsonl.gz", "msmarco_hard/train.jsonl"])
def test_cells_of_real_rows(
    shared_data: Path, name: str, texts: TemplateTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULLME_CACHE", str(tmp_path))
    triples = next(iter(TripleBatches(TripleSet(str(shared_data / name)), 64, 8)))
    batch = Collator(texts, negatives=8)(triples)
    for i, triple in enumerate(triples):
        cells = cell_texts(triple)
        assert batch.mask[i].sum() == len(cells)
        for j, text in enumerate(cells):
            target = texts.tokenizer.decode(batch.targets[i, j]).rstrip("\ufffd")
            assert target
            assert text.startswith(target)
            assert len(batch.passages[i, j]) <= 512
            assert texts.tokenizer.decode(batch.passages[i, j]).startswith(f"<bos>passage: {text[:50]}")

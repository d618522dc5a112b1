"""A tokenizer small enough to make in a test: byte-level BPE of 400 tokens, learnt from a few sentences."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Instruct: Given a web search query, retrieve relevant passages that answer the query",
    "Query: which language model turns text into a vector?\nPassage:\n",
    "A decoder reads the tokens of a passage from left to right, and an embedder reads them all at once.",
    "The positive passage answers the query; the hard negatives only look as if they did.",
    "the quick brown fox jumps over the lazy dog while the cat and the hen sleep in the red barn",
    "How many years did the governor of the colony serve? He served for thirty years, from 1621 to 1657.",
]


def tiny_tokenizer(
    bos: bool = True, eos: bool = False, padding_side: str = "right", vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A deterministic tokenizer with <bos>, <eos> and <pad>.

    bos, eos: whether the tokenizer itself puts <bos> before and <eos> behind every text; Llama-3 adds only <bos>,
        Qwen2 neither.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    frame = " ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos)
    specials = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )

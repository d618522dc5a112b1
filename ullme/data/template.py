r"""One place where an instruction, a query and a passage become text, and text becomes token ids.

    query    Instruct: {instruction}\nQuery: {text}                  bidirectional, embedded
    passage  {text}                                                  bidirectional, embedded
    prompt   Instruct: {instruction}\nQuery: {text}\nPassage:\n      causal, the condition of p(passage | query)
    target   the passage's own tokens                                causal, scored after the prompt

Training, ``encode``, evaluation and export all render through ``Template``, which is saved with the model, so the
text a model is served with is the text it was trained on. The defaults are those of E5-mistral (Wang et al. 2024).

Invariant: a text that is too long is cut in its own tokens, from its end; the template around it, the special
tokens and at least one token of the text always remain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Instruction = str | None | Sequence[str | None]

_TOKENIZE_AT_ONCE = 2048  # texts per call of the tokenizer: its offsets take far more memory than the ids we keep


@dataclass(frozen=True)
class Template:
    """Format strings with the placeholders {text} and, for query and prompt, {instruction}; braces are doubled."""

    query: str = "Instruct: {instruction}\nQuery: {text}"
    """A query to embed."""
    passage: str = "{text}"
    """A passage to embed."""
    prompt: str = "Instruct: {instruction}\nQuery: {text}\nPassage:\n"
    """What the generation of a passage is conditioned on."""
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    """The instruction where a call names none; a call that passes "" drops the line with {instruction}."""
    append_eos: bool = False
    """End each text to embed with the end-of-sequence token (last-token pooling needs it)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("query", {"text", "instruction"}),
            ("passage", {"text"}),
            ("prompt", {"text", "instruction"}),
        ):
            _check_placeholders(name, getattr(self, name), allowed)

    def render_query(self, text: str, instruction: str | None = None) -> str:
        return text.join(self.around("query", instruction))

    def render_passage(self, text: str) -> str:
        return text.join(self.around("passage"))

    def render_prompt(self, text: str, instruction: str | None = None) -> str:
        return text.join(self.around("prompt", instruction))

    def around(self, kind: str, instruction: str | None = None) -> tuple[str, str]:
        """What stands before and after the text in a "query", "passage" or "prompt".

        instruction: None for the template's own; "" removes the line that holds {instruction}, or only the
        placeholder and the space after it where {text} stands on the same line.
        """
        instruction = self.instruction if instruction is None else instruction
        template: str = getattr(self, kind)
        if not instruction.strip():
            template = _without_instruction(template)
        sides = ["", ""]
        side = 0
        for literal, field, _, _ in Formatter().parse(template):
            sides[side] += literal
            if field == "text":
                side = 1
            elif field == "instruction":
                sides[side] += instruction
        return sides[0], sides[1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; ValueError for a field that a template does not have."""
        known = cls.__dataclass_fields__
        if unknown := sorted(fields.keys() - known.keys()):
            raise ValueError(f"a template has no field {', '.join(unknown)}; its fields are {', '.join(known)}")
        return cls(**fields)


def _check_placeholders(name: str, template: str, allowed: set[str]) -> None:
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template.{name} is {template!r}: {error}; write {{{{ and }}}} for literal braces") from None
    fields = []
    for _, field, spec, conversion in pieces:
        if field is None:
            continue
        if field not in allowed or spec or conversion:
            written = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            places = " and ".join(f"{{{a}}}" for a in sorted(allowed, reverse=True))
            raise ValueError(f"template.{name} has the placeholder {{{written}}}; it may hold only {places}")
        fields.append(field)
    if fields.count("text") != 1:
        raise ValueError(f"template.{name} is {template!r}: it must hold {{text}} exactly once")


def _without_instruction(template: str) -> str:
    kept = []
    for line in template.splitlines(keepends=True):
        if "{instruction}" not in line:
            kept.append(line)
        elif "{text}" in line:
            kept.append(re.sub(r"\{instruction\}\s*", "", line))
    return "".join(kept)


class TemplateTokenizer:
    """A template with a tokenizer and two length limits: texts in, token ids out.

    tokenizer: a fast Hugging Face tokenizer; special tokens are added in front and behind as it adds them itself.
    max_query_length: tokens of a query, and of a generation prompt, template and special tokens included.
    max_passage_length: tokens of a passage, template and special tokens included.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_query_length: int = 128,
        max_passage_length: int = 512,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} is a slow tokenizer, which gives no "
                "character offsets; load its fast version (a tokenizer.json) instead"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_query_length = max_query_length
        self.max_passage_length = max_passage_length
        self._front, self._back = _special_tokens_around(tokenizer)
        if template.append_eos:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"template.append_eos is true, but the tokenizer {tokenizer.name_or_path!r} has no eos_token"
                )
            if self._back[-1:] != [tokenizer.eos_token_id]:
                self._back = [*self._back, tokenizer.eos_token_id]

    def queries(self, texts: Sequence[str], instruction: Instruction = None) -> tuple[list[list[int]], list[int]]:
        """Queries to embed.

        instruction: one for all texts or one per text; None is the template's own, "" is none.
        Returns the ids, special tokens included, and for each text the number of leading tokens that are not its
        own (special tokens and template before it; 0 where the template puts nothing before it). A token that
        holds the end of the template and the start of the text counts as the text's.
        ValueError names an empty text, or a limit that leaves no room for the text.
        """
        return self._embed("query", texts, instruction, self.max_query_length)

    def passages(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Passages to embed: ids and leading tokens, as ``queries`` gives them."""
        return self._embed("passage", texts, None, self.max_passage_length)

    def prompts(self, texts: Sequence[str], instruction: Instruction = None) -> list[list[int]]:
        """Generation prompts: leading special tokens as the tokenizer adds them, no trailing ones."""
        rows = self._bodies("prompt", texts, instruction, self.max_query_length - len(self._front))
        return [self._front + body for body, _ in rows]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of the bare passages, no special tokens, as many as ``passages`` has room for."""
        room = self.max_passage_length - len(self._front) - len(self._back)
        return [body for body, _ in self._bodies(None, texts, None, room)]

    def passages_and_targets(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """``passages`` and ``targets``, tokenised once where the template adds nothing to a passage."""
        ids, skips = self.passages(texts)
        if any(self.template.around("passage")):
            return ids, skips, self.targets(texts)
        return ids, skips, [row[len(self._front) : len(row) - len(self._back)] for row in ids]

    def _embed(
        self, kind: str, texts: Sequence[str], instruction: Instruction, limit: int
    ) -> tuple[list[list[int]], list[int]]:
        room = limit - len(self._front) - len(self._back)
        ids, skips = [], []
        for body, skip in self._bodies(kind, texts, instruction, room):
            ids.append(self._front + body + self._back)
            skips.append(skip)
        return ids, skips

    def _bodies(
        self, kind: str | None, texts: Sequence[str], instruction: Instruction, room: int
    ) -> Iterator[tuple[list[int], int]]:
        """At most ``room`` ids per text without special tokens, and the leading tokens as ``queries`` counts them.

        kind: a template of ``Template``, or None for the bare text.
        """
        name = kind or "passage"
        if isinstance(texts, str):
            raise TypeError(f"expected a list of {name} texts, got the single string {texts[:40]!r}")
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"{name} {i} of {len(texts)} is empty: every text needs a character that is no space")
        one_for_all = instruction is None or isinstance(instruction, str)
        instructions = cast(list[str | None], [instruction] * len(texts) if one_for_all else instruction)
        if len(instructions) != len(texts):
            raise ValueError(f"got {len(instructions)} instructions for {len(texts)} texts")
        around = {one: self.template.around(kind, one) if kind else ("", "") for one in set(instructions)}
        for first in range(0, len(texts), _TOKENIZE_AT_ONCE):
            chunk = slice(first, first + _TOKENIZE_AT_ONCE)
            sides = [around[one] for one in instructions[chunk]]
            encodings = self._encode([text.join(pair) for text, pair in zip(texts[chunk], sides, strict=True)])
            for i, ((before, after), encoding) in enumerate(zip(sides, encodings, strict=True), start=first):
                ids = encoding.ids
                text_end = len(before) + len(texts[i])
                start = _token_at(encoding, len(before)) if before else 0
                end = _token_at(encoding, text_end) if after else len(ids)
                if end <= start and not (start < len(ids) and encoding.offsets[start][0] < text_end):
                    raise ValueError(f"{name} {i} of {len(texts)} has no tokens: {texts[i][:40]!r}")
                overflow = max(0, len(ids) - room)
                if overflow and end - overflow <= start:
                    key = "max_passage_length" if name == "passage" else "max_query_length"
                    raise ValueError(
                        f"{key} is too small for {name} {i} of {len(texts)}: template and special tokens fill it, "
                        f"and its text needs at least one token; raise {key} by {start + 1 - end + overflow} or more"
                    )
                yield ids[: end - overflow] + ids[end:], len(self._front) + start if before else 0

    def _encode(self, texts: list[str]) -> list[Encoding]:
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        assert batch.encodings is not None  # the tokenizer is a fast one
        return batch.encodings


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer itself puts in front of and behind every text."""
    encoding = tokenizer(["a"]).encodings[0]
    special = encoding.special_tokens_mask
    if 0 not in special:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} gives no token for the text 'a'")
    front = special.index(0)
    back = special[::-1].index(0)
    return encoding.ids[:front], encoding.ids[len(encoding.ids) - back :]


def _token_at(encoding: Encoding, char: int) -> int:
    """The first token with a character at or after ``char``; the number of tokens where there is none."""
    token = encoding.char_to_token(char)
    if token is None:  # a character that the tokenizer dropped
        return next((i for i, (_, end) in enumerate(encoding.offsets) if end > char), len(encoding.ids))
    return token

"""One set of weights, two abilities (section 3.2.1).

    e(x)       = pool(h_1 .. h_t), bidirectional attention       ``embed``, ``encode``
    log pi(p|q) = sum_i log pi(w_i | w_<i, q), causal attention   ``score``, ``generate``

Invariant: padding, batch neighbours and the order of calls change neither; each call sets its own attention.

    model = ULLME("mistralai/Mistral-7B-v0.1", lora_name="ullme-mistral", lora_r=16, lora_alpha=32)
    model.encode(["what is a monad"], kind="query")      # float32 [1, D]
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ullme.data.template import Template, TemplateTokenizer
from ullme.ragged import Ragged, plan_chunks

from . import backbones
from .attention import AttentionSwitch, check_switch, position_ids
from .layout import mask_argument, supports_shared_layout
from .likelihood import lay_out, sum_per_cell, token_logps
from .pooling import Pooling, check_pooling, pool

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


class ULLME(nn.Module):
    """A decoder-only language model as a text embedder that can still generate.

    Args:
        model_name_or_path: Hugging Face id or folder of a causal language model, or docs-lm, the one we ship.
        model_backbone_type: Its family ("llama", "mistral" ...); read from the model when left out, checked when given.
        lora_name: Name of the adapter.
        lora_r: Rank of the LoRA adapter; null trains every weight (and leaves no reference for DPO).
        lora_alpha: LoRA scale, alpha / r times the update.
        lora_dropout: Dropout in front of the adapter; the base's own dropout is switched off under LoRA.
        lora_target_modules: "all-linear" (every linear layer but the head) or a list of names.
        pooling: One of first, last, mean or weighted_mean of the last hidden states.
        pool_instruction: False leaves the template's prefix (instruction, "Query: ") out of the pooling, as GritLM.
        attention: How to embed; causal leaves the attention as it was pretrained.
        template: How instruction, query and passage become text; travels with the model.
        max_query_length: Tokens of a query in training, template included.
        max_passage_length: Tokens of a passage in training, and of any text in ``encode``, as in its export.
        dtype: Of the base's weights: float32, bfloat16, float16 or auto; the adapter is always float32.
        attn_implementation: One of eager, sdpa, flash_attention_2 ...; null lets transformers choose.
        load_in_4bit: QLoRA's NF4 base (needs bitsandbytes and a GPU).
        gradient_checkpointing: Recompute activations in the backward pass.
        revision: Of the Hub repository.
        trust_remote_code: Run modelling code from the Hub; off unless you have read it.
    """

    def __init__(
        self,
        model_name_or_path: str,
        model_backbone_type: str | None = None,
        lora_name: str = "default",
        lora_r: int | None = None,
        lora_alpha: int = 32,
        lora_dropout: float = 0.0,
        lora_target_modules: str | list[str] = "all-linear",
        pooling: Pooling = "mean",
        pool_instruction: bool = True,
        attention: Literal["bidirectional", "causal"] = "bidirectional",
        template: Template | None = None,
        max_query_length: int = 128,
        max_passage_length: int = 512,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_pooling(pooling)
        if attention not in ("bidirectional", "causal"):
            raise ValueError(f"unknown attention {attention!r}: choose bidirectional or causal")
        self.name_or_path = model_name_or_path
        self.pooling, self.pool_instruction, self.attention = pooling, pool_instruction, attention
        self.tokenizer = backbones.load_tokenizer(model_name_or_path, revision, trust_remote_code)
        self.template = template or Template()
        self.texts = TemplateTokenizer(self.tokenizer, self.template, max_query_length, max_passage_length)
        base = backbones.load_backbone(
            model_name_or_path,
            model_type=model_backbone_type,
            dtype=dtype,
            attn_implementation=attn_implementation,
            load_in_4bit=load_in_4bit,
            zero_dropout=lora_r is not None,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self._check_lengths(base)
        self.adapter = lora_name if lora_r is not None else None
        self.backbone: PreTrainedModel | PeftModel = base
        if lora_r is not None:
            lora = LoraConfig(
                r=lora_r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                target_modules=lora_target_modules,
                task_type="CAUSAL_LM",
            )
            self.backbone = get_peft_model(base, lora, adapter_name=lora_name)
            lora.base_model_name_or_path = model_name_or_path  # PEFT writes the folder a built-in model lies in
        self._prepare()
        if gradient_checkpointing:
            backbones.enable_checkpointing(self.base)
        self.eval()  # as transformers' from_pretrained leaves it

    def _prepare(self) -> None:
        self.switch = AttentionSwitch(self.base)
        if self.attention == "bidirectional":
            check_switch(self.base, self.switch)
        self._scorer: tuple[backbones.LMHead, bool] | None = None

    def _check_lengths(self, base: PreTrainedModel) -> None:
        limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        for key, length in (
            ("max_query_length", self.texts.max_query_length),
            ("max_passage_length", self.texts.max_passage_length),
            (
                "max_query_length + max_passage_length",
                self.texts.max_query_length + self.texts.max_passage_length,
            ),
        ):
            if isinstance(limit, int) and 0 < limit < length:
                raise ValueError(f"{key} is {length} but {self.name_or_path} reads at most {limit} tokens: lower it")

    # what the model is

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, with LoRA layers in place where there are any."""
        return cast(PreTrainedModel, getattr(self.backbone, "get_base_model", lambda: self.backbone)())

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self.base.get_output_embeddings().weight.shape[1]

    def settings(self) -> dict[str, Any]:
        """What turns a text into this model's vector, beside its weights; plain values."""
        return {
            "pooling": self.pooling,
            "pool_instruction": self.pool_instruction,
            "attention": self.attention,
            "template": self.template.to_dict(),
            "max_query_length": self.texts.max_query_length,
            "max_passage_length": self.texts.max_passage_length,
        }

    # embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor, is_generate: bool = False, **kwargs: Any) -> Any:
        """{"rep": [b, D]} (fp32, not normalised), or with ``is_generate`` what the plain Hugging Face model gives.

        input_ids, attention_mask: int64 [b, L], padded on either side.
        """
        if is_generate:
            with self.switch.causal():
                return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return {"rep": self.embed(input_ids, attention_mask, **kwargs)}

    def embed(self, input_ids: Tensor, attention_mask: Tensor, skip: Tensor | None = None) -> Tensor:
        """[b, L] -> [b, D] in fp32. skip: int64 [b], leading tokens of each text that are template, not text."""
        decoder = backbones.inner_decoder(self.base)
        inputs = backbones.accepted(
            decoder,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
        with self.switch.bidirectional() if self.attention == "bidirectional" else self.switch.causal():
            states = decoder(**inputs)[0]
        mask = attention_mask.bool()
        if skip is not None and not self.pool_instruction:
            mask = mask & (attention_mask.cumsum(-1) > skip[:, None])
        return pool(states, mask, self.pooling)

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        kind: str = "passage",
        instruction: str | None = None,
        batch_tokens: int = 16384,
        show_progress_bar: bool = False,
        normalize: bool = True,
    ) -> np.ndarray:
        """Embeddings of the texts in their order, float32 [n, D].

        kind: query or passage. instruction: of the queries; null takes the template's, "" leaves it out.
        batch_tokens: padded tokens of one forward pass; speed and memory only. normalize: to unit length.
        """
        from tqdm.auto import tqdm

        if kind not in ("query", "passage"):
            raise ValueError(f"kind is {kind!r}: choose query or passage")
        if isinstance(texts, str):
            raise TypeError("encode takes a sequence of texts, got one string: wrap it in a list")
        reps = np.zeros((len(texts), self.dim), dtype=np.float32)
        if not len(texts):
            return reps
        length = self.texts.max_passage_length
        whole = TemplateTokenizer(self.tokenizer, self.template, length, length)
        ids, skips = whole.queries(texts, instruction) if kind == "query" else whole.passages(texts)
        rows, skip = Ragged.from_lists(ids), torch.tensor(skips)
        was_training = self.training
        self.eval()
        try:
            with tqdm(total=len(texts), desc=f"encode {kind}", unit="text", disable=not show_progress_bar) as bar:
                for chunk in plan_chunks(rows.lengths, batch_tokens):
                    reps[chunk.numpy()] = self.embed_rows(rows, chunk, skip).cpu().numpy()
                    bar.update(len(chunk))
        finally:
            self.train(was_training)
        if normalize:
            reps /= np.linalg.norm(reps, axis=-1, keepdims=True).clip(1e-12)
        return reps

    def embed_rows(self, rows: Ragged, chunk: Tensor, skip: Tensor) -> Tensor:
        """Embeddings of the flat cells ``chunk`` (int64 [b]) of ``rows``: [b, D]. skip: int64, one a flat cell."""
        ids, mask = rows.pad(chunk, self.pad_id)
        return self.embed(ids.to(self.device), mask.to(self.device), skip[chunk].to(self.device))

    # generate and score

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def shared_rows(self) -> bool:
        """Whether a query's candidates share one row (see ``likelihood``); decided by a check at first use."""
        return self._score_setup()[1]

    def _score_setup(self) -> tuple[backbones.LMHead, bool]:
        if self._scorer is None:
            head = backbones.LMHead.of(self.base)
            with self.switch.causal():
                head.check(self.base)
                shared = supports_shared_layout(self.base)
            rows = "the candidates of a query share one row" if shared else "each candidate has a row of its own"
            log.info("%s: when scoring, %s", self.base.config.model_type, rows)
            self._scorer = head, shared
        return self._scorer

    def score(self, prompts: Ragged, targets: Ragged, queries: Tensor | None = None) -> Tensor:
        """log pi(p|q), summed over the tokens of p, causal.

        prompts: [B] cells, targets: [B, N] cells (length 0 where there is none), queries: int64 [b], those to score
        (default: all). Returns [b, N] in fp32, 0 for a missing cell.
        """
        queries = torch.arange(len(prompts.lengths)) if queries is None else queries
        head, shared = self._score_setup()
        layout = lay_out(prompts, targets, queries, shared, self.pad_id).to(self.device)
        decoder = backbones.inner_decoder(self.base)
        mask: Any = (layout.segments >= 0).long()
        if shared:
            mask = mask_argument(self.base, layout.segments, layout.positions)
        inputs = backbones.accepted(
            decoder,
            input_ids=layout.input_ids,
            attention_mask=mask,
            position_ids=layout.positions,
            use_cache=False,
        )
        with self.switch.causal():
            states = decoder(**inputs)[0].flatten(0, 1)[layout.source]
        return sum_per_cell(token_logps(states, layout.targets, head), layout.cell, (len(queries), targets.shape[1]))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The model before fine-tuning: the same weights with the adapter off, and no second copy."""
        if self.adapter is None:
            raise ValueError("the reference is the model with its adapter off, and there is none: set model.lora_r")
        layers = [module for module in self.backbone.modules() if isinstance(module, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer._disable_adapters = value

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], **kwargs: Any) -> list[str]:
        """Continuations of the raw prompts, causal; ``kwargs`` as transformers' ``generate``."""
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        try:
            inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.device)
        finally:
            self.tokenizer.padding_side = side
        inputs.pop("token_type_ids", None)
        was_training = self.training
        self.eval()
        try:
            with self.switch.causal():
                output = cast(Any, self.backbone).generate(**inputs, pad_token_id=self.pad_id, **kwargs)
        finally:
            self.train(was_training)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    # keep

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a merged folder that SentenceTransformer, transformers and ``from_pretrained`` open."""
        from .export import export

        return export(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> ULLME:
        """Open what ``save_pretrained`` wrote, or a folder with a PEFT adapter of ours."""
        from .export import open_export

        return open_export(cls, folder, **overrides)

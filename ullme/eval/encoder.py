"""``WrappedULLME``: a ULLME as mteb wants an encoder (listing 3 of the paper).

The conventions are those of E5-mistral (Wang et al. 2024), rendered through the template that the model was trained
with:

    retrieval           query: query template with the task's instruction      document: passage template
    reranking           both sides as queries (``instruct_reranked_documents``)
    all other tasks     every text as a query
    classification      not normalised (``normalize_for_classification``)

Invariant: the name under which mteb files a score changes with everything that could change it (``fingerprint``);
the instruction of a task, which is not the model's, is compared by ``ullme.eval.mteb`` before a score is reused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from ullme.eval.fingerprint import fingerprint, tokenizer_digest
from ullme.eval.instructions import instruction_for
from ullme.eval.retrieval import embed

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

    from ullme.models import ULLME


SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


class WrappedULLME(AbsEncoder):
    """A ULLME built from its parts and, optionally, the weights that training left.

    model_name_or_path, model_backbone_type, lora_name, lora_r, lora_alpha, **settings: as for ``ULLME``.
    model_checkpoint: a Lightning checkpoint of ours, a PEFT adapter folder or an export; None keeps the weights.
    instruct_reranked_documents: give the documents of reranking tasks the instruction too, as E5's script does.
    normalize_for_classification: scale embeddings to unit length in classification tasks too.
    batch_tokens: padded tokens of one forward pass; speed and memory only.
    """

    def __init__(
        self,
        model_name_or_path: str,
        model_backbone_type: str | None = None,
        lora_name: str = "default",
        lora_r: int | None = None,
        lora_alpha: int = 32,
        model_checkpoint: str | Path | None = None,
        *,
        name: str | None = None,
        instruct_reranked_documents: bool = True,
        normalize_for_classification: bool = False,
        batch_tokens: int = 16_384,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> None:
        from ullme.eval.models import build
        from ullme.models import ULLME

        arguments = settings | {
            "model_name_or_path": model_name_or_path,
            "model_backbone_type": model_backbone_type,
            "lora_name": lora_name,
            "lora_r": lora_r,
            "lora_alpha": lora_alpha,
        }
        model = ULLME(**arguments) if model_checkpoint is None else build(model_checkpoint, arguments)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._wrap(
            model,
            name or str(model_checkpoint or model_name_or_path),
            instruct_reranked_documents=instruct_reranked_documents,
            normalize_for_classification=normalize_for_classification,
            batch_tokens=batch_tokens,
        )

    @classmethod
    def from_model(cls, model: ULLME, name: str | None = None, **conventions: Any) -> Self:
        """Wrap a model in memory, where it is; its weights must not change while the wrapper is in use."""
        self = cls.__new__(cls)
        self._wrap(model, name or str(model.name_or_path), **conventions)
        return self

    def _wrap(
        self,
        model: ULLME,
        name: str,
        *,
        instruct_reranked_documents: bool = True,
        normalize_for_classification: bool = False,
        batch_tokens: int = 16_384,
    ) -> None:
        self.model = model
        self.instruct_reranked_documents = instruct_reranked_documents
        self.normalize_for_classification = normalize_for_classification
        self.batch_tokens = batch_tokens
        self._corpus: tuple[str, str | None, list[str]] | None = None
        self._corpus_embeddings = np.empty((0, model.dim), dtype=np.float32)
        settings = {
            **model.settings(),
            "instruct_reranked_documents": instruct_reranked_documents,
            "normalize_for_classification": normalize_for_classification,
        }
        self.mteb_model_meta = local_meta(
            f"ullme/{readable_name(name)}",
            revision=fingerprint(model, {**settings, **_architecture(model)}),
            settings=settings,
            embed_dim=model.dim,
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            max_tokens=settings["max_passage_length"],
            use_instructions=True,
        )

    def prompt(self, task: TaskMetadata, prompt_type: PromptType | None) -> tuple[str, str | None]:
        """(kind, instruction) of one side of a task, as ``ULLME.encode`` takes them."""
        document = prompt_type == PromptType.document
        if document and not ("Reranking" in task.type and self.instruct_reranked_documents):
            return "passage", None
        return "query", instruction_for(task.name)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> np.ndarray:
        """float32 [n, D]. inputs: batches whose "text" is a list of texts (titles already joined).

        The last block of documents stays in memory: a search after an evaluation reads its corpus once.
        """
        kind, instruction = self.prompt(task_metadata, prompt_type)
        texts = [text for batch in inputs for text in batch["text"]]
        corpus = (kind, instruction, texts) if prompt_type == PromptType.document else None
        if corpus is not None and corpus == self._corpus:
            return self._corpus_embeddings
        embeddings = embed(
            self.model,
            texts,
            kind,
            instruction=instruction,
            batch_tokens=self.batch_tokens,
            show_progress_bar=show_progress_bar,
            normalize=self.normalize_for_classification or task_metadata.type != "Classification",
        )
        if corpus is not None:
            self._corpus, self._corpus_embeddings = corpus, embeddings
        return embeddings


def local_meta(name: str, revision: str, settings: dict[str, Any], **known: Any) -> ModelMeta:
    """mteb's record of a model that no hub holds: cosine similarity, ``settings`` to be read beside the scores."""
    unknown = {field: None for field, info in ModelMeta.model_fields.items() if info.is_required()}
    fields = unknown | {
        "name": name,
        "revision": revision,
        "loader_kwargs": settings,
        "framework": ["PyTorch"],
        "similarity_fn_name": ScoringFunction.COSINE,
    }
    return ModelMeta(**(fields | known))


def readable_name(path: str) -> str:
    """The last two parts of a path or id, for file names: "runs/grl/export" -> "grl-export"."""
    whole = Path(path).resolve() if Path(path).exists() else Path(path.replace(":", "-"))
    return "-".join(part for part in whole.parts[-2:] if part != whole.anchor)


def _architecture(model: ULLME) -> dict[str, Any]:
    """What acts on the weights without being one: tokenizer, configuration, attention kernel, the adapter's scale."""
    config = model.base.config
    adapters = getattr(model.backbone, "peft_config", {})
    return {
        "tokenizer": tokenizer_digest(model.tokenizer),
        "config": config.to_json_string(),
        "attn_implementation": config._attn_implementation,
        "adapters": {name: [getattr(lora, key) for key in SCALE] for name, lora in adapters.items()},
    }

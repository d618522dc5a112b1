"""The LightningModule: one optimiser step is one exact joint gradient (section 3.2.2, section 4, appendix A).

    theta <- AdamW(theta, clip(grad sum_k weight_k L_k, max_grad_norm)),  learning rate warmed up, then decayed

Optimisation is manual because the gradient is accumulated by ``GradCacheStep`` in several backward passes; the norm
that is clipped is that of the whole gradient.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ullme.data.beir import Collection
from ullme.data.collate import Batch
from ullme.losses import Losses
from ullme.models.ullme import ULLME

from .gradcache import GradCacheStep, NonFiniteLoss
from .ranks import Ranks

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class ULLMEModule(L.LightningModule):
    """Fine-tunes a ULLME.

    Args:
        losses: Terms of the objective with their weights; null leaves a term out.
        token_budget: Padded tokens of one forward pass; changes memory and speed, never a number.
        replay: Embed every chunk twice (GradCache) rather than hold all activations; changes no number either.
        learning_rate: Of AdamW, at its peak.
        weight_decay: Of AdamW.
        adam_betas: Of AdamW.
        warmup_ratio: Share of the steps in which the learning rate rises from 0.
        schedule: What it does then: cosine or linear to 0, or constant.
        max_grad_norm: The gradient is scaled down to this norm; null leaves it.
        model_arguments: Those of ``ullme.models.ULLME``.
    """

    def __init__(
        self,
        losses: Losses = Losses(),  # noqa: B008
        token_budget: int = 8192,
        replay: bool = True,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        warmup_ratio: float = 0.1,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        max_grad_norm: float | None = 1.0,
        **model_arguments: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds the trained weights only
        self.losses, self.token_budget, self.replay = losses, token_budget, replay
        self.learning_rate, self.weight_decay, self.adam_betas = learning_rate, weight_decay, adam_betas
        self.warmup_ratio, self.schedule, self.max_grad_norm = warmup_ratio, schedule, max_grad_norm
        self.model_arguments = model_arguments
        self.model: ULLME | None = None

    @classmethod
    def around(cls, model: ULLME, **settings: Any) -> ULLMEModule:
        """A module that trains a model which is there already."""
        module = cls(**settings)
        module.model = model
        return module

    def configure_model(self) -> None:
        if self.model is None:
            self.model = ULLME(**self.model_arguments)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, betas=self.adam_betas
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_scheduler(
            SCHEDULES[self.schedule], optimizer, round(self.warmup_ratio * steps), num_training_steps=steps
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        check_precision(self.trainer.precision)
        assert self.model is not None
        check_trained_dtype(self.model)
        self.model.train()  # from_pretrained leaves eval mode, where dropout and checkpointing are silently off
        ranks = Ranks(self.global_rank, self.trainer.world_size)
        if ranks.size > 1:
            self._join(ranks)
        self.step = GradCacheStep(self.model, self.losses, self.token_budget, self.replay, self.manual_backward, ranks)

    def _join(self, ranks: Ranks) -> None:
        """Ranks draw dropout of their own, and DDP's own averaging, one a backward, gives way to the step's."""
        ddp = self.trainer.strategy.model
        if not isinstance(ddp, DistributedDataParallel):
            raise ValueError(f"{ranks.size} processes need trainer.strategy ddp, got {self.trainer.strategy}")
        ddp.no_sync().__enter__()
        torch.manual_seed(torch.initial_seed() + ranks.rank)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer, schedule = cast(LightningOptimizer, self.optimizers()), cast(LRScheduler, self.lr_schedulers())
        started = time.perf_counter()
        try:
            result = self.step(batch)
        except NonFiniteLoss as error:
            optimizer.zero_grad()
            raise NonFiniteLoss(f"step {self.global_step}: {error}; {self._last_checkpoint()}") from None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        if not torch.isfinite(norm):
            optimizer.zero_grad()
            raise NonFiniteLoss(f"step {self.global_step}: gradient norm = {float(norm)}; {self._last_checkpoint()}")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        self._log_step(batch, result.losses, result.metrics | {"grad_norm": norm}, time.perf_counter() - started)

    def _log_step(self, batch: Batch, losses: dict[str, Tensor], metrics: dict[str, Tensor], seconds: float) -> None:
        size = len(batch)
        tokens = int(batch.queries.lengths.sum() + batch.passages.lengths.sum())
        rates: dict[str, Any] = {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds}
        if self.device.type == "cuda":
            rates["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        rates["learning_rate"] = cast(LRScheduler, self.lr_schedulers()).get_last_lr()[0]
        self.log_dict(losses, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=size)
        self.log_dict({f"speed/{name}": float(value) for name, value in rates.items()}, batch_size=size)

    def _last_checkpoint(self) -> str:
        path = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or getattr(
            self.trainer.checkpoint_callback, "best_model_path", ""
        )
        return f"the last good checkpoint is {path}" if path else "no checkpoint had been written yet"

    def validation_step(self, collection: Collection, batch_idx: int) -> None:
        from ullme.eval.retrieval import evaluate_collection

        for name, value in evaluate_collection(cast(Any, self.model), collection).items():
            self.log(f"val/{name}", value, prog_bar=name == "ndcg@10", batch_size=len(collection.queries))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # texts stay on the host; each chunk goes to the device when it is formed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["model_arguments"] = plain(self.model_arguments)


def check_precision(precision: str | int | None) -> None:
    if precision == "16-mixed":
        raise ValueError("trainer.precision 16-mixed needs loss scaling, which this step has not: use bf16-mixed")


def check_trained_dtype(model: ULLME) -> None:
    """AdamW's updates of half-precision weights are mostly rounded away."""
    half = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad} - {"float32"}
    if half:
        raise ValueError(
            f"the weights to train are {half.pop()}: set model.dtype to float32 (trainer.precision bf16-mixed still "
            "computes in bf16), or model.lora_r, whose adapter is float32 over a base of any dtype"
        )


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, so that a checkpoint holds no pickled classes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in vars(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value

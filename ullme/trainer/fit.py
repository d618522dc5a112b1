"""Listing 2 of the paper: an epoch of the joint objective in two lines, over the code that ``train.py`` runs.

trainer = GradCacheTrainer(con_loss_type="NTXentLoss", gen_loss_type="dpo", use_kl_loss=True)
trainer.fit_epoch(model=model, train_loader=loader)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import lightning as L
from torch.utils.data import DataLoader, Dataset

from ullme.data.collate import Batch
from ullme.losses import Losses
from ullme.models.ullme import ULLME

from .module import ULLMEModule


class GradCacheTrainer:
    """Trains a ULLME on batches of our ``Collator``.

    con_loss_type: "NTXentLoss" or None. gen_loss_type: "sft", "dpo" or None. use_kl_loss: add L_KL.
    losses: the terms in full, instead of the three names. trainer: arguments of ``lightning.Trainer``.
    settings: of ``ULLMEModule`` (learning_rate, token_budget ...).
    """

    def __init__(
        self,
        con_loss_type: str | None = "NTXentLoss",
        gen_loss_type: str | None = "dpo",
        use_kl_loss: bool = True,
        losses: Losses | None = None,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.losses = losses or Losses.from_names(con_loss_type, gen_loss_type, use_kl_loss)
        self.settings = settings
        self.trainer_arguments = {
            "max_epochs": 1,
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
        } | (trainer or {})

    def fit_epoch(self, model: ULLME, train_loader: Iterable[Batch]) -> dict[str, float]:
        """One pass over the loader; the model is trained in place. Returns the last step's losses and metrics."""
        if isinstance(train_loader, list | tuple):  # Lightning would take it for a list of loaders
            train_loader = DataLoader(cast(Dataset, train_loader), batch_size=None)
        trainer = L.Trainer(**self.trainer_arguments)
        trainer.fit(ULLMEModule.around(model, losses=self.losses, **self.settings), train_loader)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

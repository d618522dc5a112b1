"""What happens around training: the model is exported when it ends well."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from .module import ULLMEModule


class ExportModel(L.Callback):
    """Writes the trained model to a folder that SentenceTransformer, transformers and ``evaluate.py`` open.

    Args:
        folder: Where; relative to ``trainer.default_root_dir``.
    """

    def __init__(self, folder: str = "export") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            model = cast(ULLMEModule, pl_module).model
            assert model is not None
            path = model.save_pretrained(Path(trainer.default_root_dir) / self.folder)
            rank_zero_info(f"exported to {path}: python evaluate.py --model {path} --tasks ...")

"""What happens around training: the model is exported when it ends well."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info


class ExportModel(L.Callback):
    """Writes the trained model to a folder that SentenceTransformer, transformers and ``evaluate.py`` open.

    Args:
        folder: Where; relative to ``trainer.default_root_dir``.
    """

    def __init__(self, folder: str = "export") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path = pl_module.model.save_pretrained(Path(trainer.default_root_dir) / self.folder)
            rank_zero_info(f"exported to {path}: python evaluate.py --model {path} --tasks ...")

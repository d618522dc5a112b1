"""The command line of ``train.py``: LightningCLI over ``ULLMEModule`` and ``TriplesDataModule``.

A run's folder is ``trainer.default_root_dir``: metrics.csv, config.yaml, checkpoints/ and export/ go there.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from ullme.data.datamodule import TriplesDataModule

from .module import ULLMEModule

TRACEBACK = Path("runs/error.log")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NOISE = (
    "Total length of `list` across ranks is zero",  # a run without validation
    "does not have many workers",
    "is deprecated and will be removed",  # of libraries about each other
    "`isinstance(treespec, LeafSpec)`",
    "Checkpoint directory",
    "Using ModelCheckpoint with manual optimization",  # it saves after the step, as it should
    "You have overridden `transfer_batch_to_device`",  # texts stay on the host
)


def find_config(name: str) -> str:
    """The path of a config: as given, else in configs/ of the current folder or of the repository."""
    for folder in (Path(), Path("configs"), CONFIGS):
        if (folder / name).is_file():
            return str(folder / name)
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    raise SystemExit(f"error: no config {name!r} here or in configs/; there are {', '.join(known)}")


def resolve_configs(arguments: Sequence[str]) -> list[str]:
    """The command line with every ``--config NAME`` made a path."""
    resolved, expecting = [], False
    for argument in arguments:
        if expecting:
            argument = find_config(argument)
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        expecting = argument in ("--config", "-c")
        resolved.append(argument)
    return resolved


class ULLMECLI(LightningCLI):
    """Refuses every key it does not know; each run leaves its metrics and its whole config in its folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {"trainer.logger": False, "trainer.default_root_dir": "runs/default", "trainer.num_sanity_val_steps": 0}
        )

    def before_instantiate_classes(self) -> None:
        logging.getLogger("ullme").setLevel(logging.INFO)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
            lambda record: "litlogger" not in record.getMessage()
        )
        for message in NOISE:
            warnings.filterwarnings("ignore", message=f".*{re.escape(message)}")
        options = self.config[self.subcommand] if self.subcommand else self.config
        if options.get("weights_only", True) is None:
            options.weights_only = True  # --ckpt_path unpickles no code

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if not getattr(trainer, "fast_dev_run", False):
            csv = CSVLogger(trainer.default_root_dir, name="", version="", flush_logs_every_n_steps=10)
            trainer.loggers = [csv, *trainer.loggers]
        return trainer


def main() -> None:
    """Run the process's command line; what goes wrong ends it with one sentence, the traceback kept beside."""
    sys.argv[1:] = resolve_configs(sys.argv[1:])
    try:
        run()
    except (ValueError, OSError, FloatingPointError) as error:
        TRACEBACK.parent.mkdir(exist_ok=True)
        TRACEBACK.write_text(traceback.format_exc())
        raise SystemExit(f"error: {error} (traceback in {TRACEBACK})") from None


def run() -> None:
    ULLMECLI(
        ULLMEModule,
        TriplesDataModule,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"allow_abbrev": False},  # a misspelt key that begins another is no abbreviation of it
        auto_configure_optimizers=False,
    )

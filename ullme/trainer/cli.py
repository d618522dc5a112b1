"""The command line of ``train.py``: LightningCLI over ``ULLMEModule`` and ``TriplesDataModule``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from ullme.data.datamodule import TriplesDataModule

from .module import ULLMEModule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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
    """Seeds first, saves the resolved config beside the run, refuses every key it does not know."""

    def before_instantiate_classes(self) -> None:
        logging.getLogger("ullme").setLevel(logging.INFO)
        # texts are sharded and tokenised by us, and validation ranks a whole collection in one step
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Trying to infer the `batch_size`.*")


def main(arguments: Sequence[str] | None = None) -> ULLMECLI:
    """Parse and run ``arguments`` (default: the process's own)."""
    return ULLMECLI(
        ULLMEModule,
        TriplesDataModule,
        args=resolve_configs(sys.argv[1:] if arguments is None else arguments),
        seed_everything_default=0,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
    )

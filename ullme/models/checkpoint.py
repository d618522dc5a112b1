"""From a Lightning checkpoint back to a model. It holds the trained weights only, and no pickled class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ullme.data.template import Template

from .ullme import ULLME

PREFIX = "model."


def load_checkpoint(path: str | Path, **overrides: Any) -> ULLME:
    """The ULLME of a checkpoint that ``train.py`` wrote: its base by name, the trained weights from the file.

    overrides: arguments of ``ULLME`` that differ from those of the run (a moved base, another dtype).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "model_arguments" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of ours: it names no model_arguments")
    arguments = checkpoint["model_arguments"]
    if arguments.get("template") is not None:
        arguments["template"] = Template.from_dict(arguments["template"])
    arguments |= overrides
    model = ULLME(**arguments)
    state = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if state.keys() != trained:
        raise ValueError(
            f"{path} was written for another backbone or adapter: it lacks {sorted(trained - state.keys())[:3]} "
            f"and has {sorted(state.keys() - trained)[:3]} beside what {model.name_or_path} trains"
        )
    model.load_state_dict(state, strict=False)
    return model

"""Random state, taken and replayed, so that a forward pass run twice draws the same dropout masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RNGState:
    """State of the CPU generator and, on an accelerator, of the device's."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RNGState:
        """The state as it is now."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    @classmethod
    @contextlib.contextmanager
    def kept(cls, device: torch.device) -> Iterator[None]:
        """Whatever is drawn inside the block, the state after it is the state before it."""
        before = cls.of(device)
        try:
            yield
        finally:
            before.restore()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block the generators run from this state; after it they go on where they were."""
        with RNGState.kept(self.device):
            self.restore()
            yield

"""What a run needs to go on exactly where it stopped, in one file that is replaced as a whole."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenzoo.tokenizers.files import replacing


class AveragedWeights:
    """Exponential moving average of the parameters that are trained.

    The decay rises with the number of updates, (1 + n) / (10 + n) at first, so that the start is forgotten soon.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Moves the average towards the current parameters."""
        weight = 1 - min(self.decay, (1 + updates) / (10 + updates))
        for name, parameter in module.named_parameters():
            if name in self.values:
                self.values[name].lerp_(parameter.detach(), weight)

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state dict with averaged parameters."""
        return {name: self.values.get(name, tensor) for name, tensor in module.state_dict().items()}


@dataclass
class Checkpoint:
    """State after `step` optimizer steps, and the recipe they were taken by.

    Data and randomness are functions of the step, so they need no state.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    averaged: dict[str, Tensor]
    adversary: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the checkpoint; an interruption leaves the one before it."""
        with replacing(path) as temporary:
            torch.save(vars(self), temporary)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads what `save` wrote."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))

"""Adversarial training of audio and clips: discriminators with an optimizer of their own, beside a tokenizer's objective.

Hinge losses and feature matching, as in WavTokenizer (https://arxiv.org/abs/2408.16532) and Vocos.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenzoo.encoders.clip_discriminators import ClipDiscriminators
from tokenzoo.encoders.discriminators import Discriminators
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.training.recipe import AdversaryRecipe


class Adversary:
    """Discriminators in a run, and what they learned so far.

    Args:
        recipe: Sizes, weights and learning rate.
        accelerator: Of the run.
        seed: Of the first weights.
        modality: Of the tokenizer: `"video"`, or audio.
    """

    def __init__(self, recipe: AdversaryRecipe, accelerator: Accelerator, seed: int, *, modality: Modality = "audio") -> None:
        self.recipe, self.accelerator = recipe, accelerator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.Module
            if modality == "video":
                self.module = ClipDiscriminators(recipe.width)
            else:
                self.module = Discriminators(recipe.periods, recipe.windows, recipe.width)
        self.module.to(accelerator.device)
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(self.module, optimizer)

    def learn(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        """One step of the discriminators on audio `[B, 1, S]` or clips `[B, T, 3, H, W]`; returns their hinge loss."""
        with self.accelerator.autocast():
            # One call for both, since a distributed model is called once a step.
            found = self.model(torch.cat([original, reconstruction.detach()]))
            loss = torch.stack([_hinge(activations[-1]) for activations in found]).mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def losses(self, reconstruction: Tensor, original: Tensor) -> dict[str, Tensor]:
        """What the tokenizer is told: to be taken for an original, and to cause the same activations as one."""
        self.module.requires_grad_(False)
        with self.accelerator.autocast():
            fake = self.module(reconstruction)
            with torch.no_grad():
                real = self.module(original)
        self.module.requires_grad_(True)
        taken = torch.stack([torch.relu(1 - activations[-1].float()).mean() for activations in fake]).mean()
        distances = [
            (x.float() - y.float()).abs().mean() / y.float().abs().mean().clamp_min(1e-4)
            for left, right in zip(fake, real, strict=True)
            for x, y in zip(left[:-1], right[:-1], strict=True)
        ]
        return {
            "adversarial": self.recipe.adversarial * taken,
            "features": self.recipe.features * torch.stack(distances).mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimizer's state."""
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _hinge(logits: Tensor) -> Tensor:
    """Of the logits of as many originals as reconstructions, which follow them."""
    real, fake = logits.float().chunk(2)
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()

"""KARL nano: a small image tokenizer that finds in one pass how many tokens an asked error needs, trained here from photos.

From KARL (https://arxiv.org/abs/2507.07995) it takes the mechanism: the encoder is told the mean absolute error that is
asked for, gives every token a probability of being halted, and nothing is decoded to find the length; and it takes the
training, in which the error that a random number of tokens reached is what is asked for next. What lies below is One-D-Piece
nano: a progressive code of DCT coefficients, of which any prefix decodes, and a refiner.

The probability that token t is halted is a logistic function of how far the error that the t tokens before it are predicted
to leave lies below the asked one. The prediction starts from what the encoder knows anyway, the energy of the coefficients
that those tokens leave, and a small network corrects it by the detail that the image has at several scales. So the kept
tokens are always the first ones.

Shapes: B batch, N tokens, K kept coefficients, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.tokenizers import Output, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.image._common import is_finite
from tokenzoo.tokenizers.image.one_d_piece_nano import OneDPieceNano, OneDPieceNanoConfig
from tokenzoo.tokenizers.quality import l1, psnr

_FLOOR, _DETAIL_FLOOR = 1e-6, 1e-4
_NEVER = -1e4


@strict
@dataclass(kw_only=True)
class KARLNanoConfig(OneDPieceNanoConfig):
    """Size of the tokenizer. Attributes beyond those of `OneDPieceNanoConfig`:

    Attributes:
        halting_dim: Width of the network that corrects the predicted error.
        halting_threshold: Tokens with a higher probability of being halted are left out.
        default_error: What is asked for where `encode` is given neither a target nor a length.
    """

    num_tokens: int = 256
    luma_radius: int = 48
    chroma_radius: int = 20
    width: int = 48
    halting_dim: int = 64
    halting_threshold: float = 0.75
    default_error: float = 0.05


class Halting(nn.Module):
    """Of the errors that prefixes leave in coefficients, logits that the tokens after them are halted."""

    def __init__(self, dim: int, num_details: int) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-0.4))
        self.image = nn.Linear(num_details, dim)
        self.prefix = nn.Linear(4, dim)
        last = nn.Linear(dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.correction = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), last)

    def forward(self, left_BN: Tensor, details: Tensor, asked: Tensor) -> Tensor:
        """Logits `[B, N]`.

        Args:
            left_BN: Root mean square per pixel `[B, N]` of what the first 1, 2, ... N tokens leave.
            details: Of `image_details`, `[B, details]`.
            asked: Mean absolute error that is asked for, `[B]`.
        """
        left = torch.log(left_BN + _FLOOR)
        error = torch.log(asked + _FLOOR)[:, None].expand_as(left)
        place = torch.log(torch.arange(1, left.shape[1] + 1, device=left.device).float()).expand_as(left)
        prefix = self.prefix(torch.stack([left, error, place, left - left[:, :1]], -1))
        predicted = left + self.bias + self.correction(prefix + self.image(details)[:, None])[..., 0]
        logits = self.log_slope.exp() * (error - predicted)
        # Token t is halted if the t before it are enough; the first never is.
        return F.pad(logits[:, :-1], (1, 0), value=_NEVER)


def image_details(images: Tensor) -> Tensor:
    """What averages over 2, 4, 8, ... pixels take away from images `[B, 3, H, W]`: logs of mean and root mean square."""
    images, details = images.float(), []
    for side in _scales(images.shape[2]):
        lost = (images - F.interpolate(F.avg_pool2d(images, side), scale_factor=side)).flatten(1)
        details += [lost.abs().mean(1), lost.square().mean(1).sqrt()]
    return torch.log(torch.stack(details, 1) + _DETAIL_FLOOR)


def _scales(size: int) -> list[int]:
    """Powers of two up to half of a size, which divide it."""
    return [side for side in (2**i for i in range(1, size.bit_length())) if 2 * side <= size and size % side == 0]


class KARLNano(OneDPieceNano):
    """The tokenizer: of up to `num_tokens` ids per image, as many first ones as the asked error needs.

    `encode(image, target={"l1": 0.05})` asks for a mean absolute error and decides in one pass; other targets are met by
    bisection, and `length=` by cutting off, since every prefix decodes.
    """

    architecture: ClassVar[str] = "karl_nano"
    config_class: ClassVar[type[TokenizerConfig]] = KARLNanoConfig
    config: KARLNanoConfig

    def __init__(self, config: KARLNanoConfig) -> None:
        super().__init__(config)
        self.halting = Halting(config.halting_dim, 2 * len(_scales(config.image_size)))

    @torch.no_grad()
    def encode_at(self, images: Tensor, error: float) -> tuple[Tensor, Tensor]:
        """Ids `[B, 1, L]` and lengths `[B, 1]` of images `[B, 3, H, W]` in [0, 1] for an asked mean absolute error.

        One pass, in which nothing is decoded.
        """
        ids, left = self._measured_code(images, self.config.classes_tried)
        halting = self._halting(images, left, torch.full((len(images),), error, device=images.device))
        lengths = (halting.sigmoid() <= self.config.halting_threshold).sum(1)
        longest = int(lengths.max())
        real = torch.arange(longest, device=ids.device) < lengths[:, None]
        return (ids[:, :longest] * real)[:, None], lengths[:, None]

    def _measured_code(self, images: Tensor, tries: int) -> tuple[Tensor, Tensor]:
        """All ids `[B, N]`, and what each prefix leaves: root mean square per value of the image, `[B, N]`."""
        with torch.autocast(images.device.type, enabled=False):
            spectrum = self.spectrum(images)
            x_BK = spectrum[:, self.kept]
            ids, errors = self.code.encode_with_errors(x_BK, self.config.num_tokens, tries=tries)
            lost = (spectrum.square().sum(1) - x_BK.square().sum(1)).clamp(min=0)
            return ids, ((errors + lost[:, None]) / spectrum.shape[1]).sqrt()

    def _halting(self, images: Tensor, left: Tensor, asked: Tensor) -> Tensor:
        """Logits `[B, N]` that each token is halted, in float32 whatever the weights' precision."""
        with torch.autocast(images.device.type, enabled=False):
            weights = {name: parameter.float() for name, parameter in self.halting.named_parameters()}
            return torch.func.functional_call(self.halting, weights, (left, image_details(images), asked.float()))

    def _encode_batch(
        self,
        batch: Tensor,
        meta: list[dict[str, Any]],
        budgets: list[int] | None,
        target: Mapping[str, float] | None,
        seed: int,
    ) -> Tokens:
        if budgets is not None or (target is not None and set(target) != {"l1"}):
            return super()._encode_batch(batch, meta, budgets, target, seed)
        if target is not None:
            meta = [{**facts, "target": {"asked": float(target["l1"])}} for facts in meta]
        error = self.config.default_error if target is None else float(target["l1"])
        ids, lengths = self.encode_at(batch.to(self.device, self.dtype), error)
        return Tokens(ids, lengths, self.info, meta=meta).to("cpu")

    def _check_target(self, target: Mapping[str, float] | None) -> None:
        super()._check_target(target)
        error = (target or {}).get("l1", 1)
        if not (is_finite(error) and error > 0):
            raise TokensError(f"expected a positive mean absolute error, got target={target}")

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """The log of the mean absolute error of random prefixes, and the cross entropy of halting.

        A prefix of n tokens reaches some error; asked for that error, the halting network shall call the first n tokens
        active and the rest halted.
        """
        del progress
        with torch.no_grad():
            ids, left = self._measured_code(batch, 1)
        lengths = self._training_lengths(len(batch), generator).to(batch.device)
        reconstruction = self.reconstruct(ids, lengths).float()
        reached = l1(reconstruction, batch)
        seen = l1(reconstruction.detach().clamp(0, 1), batch)
        logits = self._halting(batch, left, seen)
        halted = (torch.arange(self.config.num_tokens, device=batch.device) >= lengths[:, None]).float()
        losses = {
            "log_error": torch.log(reached + 1e-3).mean(),
            "halting": F.binary_cross_entropy_with_logits(logits, halted),
        }
        count = (logits.detach().sigmoid() <= self.config.halting_threshold).sum(1)
        metrics = {
            "psnr": psnr(reconstruction.detach().clamp(0, 1), batch).mean(),
            "l1": seen.mean(),
            "length_ratio": torch.log(count / lengths).abs().mean().exp(),
        }
        return Output(reconstruction, losses, metrics)

    def _training_lengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Prefix lengths: a half uniform, a half log-uniform."""
        device = generator.device if generator is not None else "cpu"
        longest = self.config.num_tokens
        kind, place = torch.rand(2, count, generator=generator, device=device)
        lengths = torch.where(kind < 0.5, 1 + longest * place, (longest + 1.0) ** place)
        return lengths.long().clamp(1, longest)

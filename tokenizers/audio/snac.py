"""SNAC: codes at several rates, so that few coarse tokens carry a recording's slow structure.

Paper: https://arxiv.org/abs/2410.14411
Reference implementation: hubertsiuzdak/snac@f49016a (1.2.1), MIT, weights too.

24 kHz (three codebooks at 11.7, 23.4 and 46.9 tokens per second), 32 and 44.1 kHz (four codebooks, from 10.4 and 14.4 to 83.3
and 114.8), mono, non-causal. `Tokens.lengths` has the length of every codebook, and `flatten("interleaved")` is the
depth-first order (1, 2 and 4 tokens a coarse frame) that language models over SNAC are trained on.

Here, unlike there: the decoder's noise is drawn with a seed, so that decoding repeats itself, or left out
(`tok.noise_seed = None`). With seed n it is the noise that the reference draws for one recording after `torch.manual_seed(n)`.

Shapes: B batch, S samples, D width of the latents, T frames of the finest codebook, K codebooks.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.snake import seed_noise, snake_decoder, snake_encoder
from tokenzoo.encoders.streaming import Chain, State
from tokenzoo.tokenizers import Codes, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.published import NEW_SPELLING, FoldingAdapter
from tokenzoo.tokenizers.quantizers import FactorizedQuantizer, Quantized, carry_gradient, mean


@strict
@dataclass(kw_only=True)
class SnacConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the 24 kHz model.

    Attributes:
        sample_rate: In Hz.
        encoder_dim: Channels at the sample rate in the encoder.
        encoder_strides: Of the encoder's stages.
        decoder_dim: Channels at the frame rate in the decoder.
        decoder_strides: Of the decoder's stages.
        window: Frames that attend to each other; 0 for no attention.
        codebook_size: Codes per codebook.
        codebook_dim: Width of a code.
        strides: Frames that one code of each codebook stands for, coarsest first.
        noise: Whether the decoder has layers that add noise.
        commitment: Weight of the commitment loss.
    """

    sample_rate: int = 24000
    encoder_dim: int = 48
    encoder_strides: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = 1024
    decoder_strides: tuple[int, ...] = (8, 8, 4, 2)
    window: int = 0
    codebook_size: int = 4096
    codebook_dim: int = 8
    strides: tuple[int, ...] = (4, 2, 1)
    noise: bool = True
    commitment: float = 0.25

    @property
    def hop(self) -> int:
        """Samples per frame of the finest codebook."""
        return math.prod(self.encoder_strides)

    @property
    def latent_dim(self) -> int:
        """Width of the latents."""
        return int(self.encoder_dim * 2 ** len(self.encoder_strides))

    @property
    def frames_together(self) -> int:
        """Frames that belong together: recordings are filled up to a multiple of so many."""
        return math.lcm(*self.strides, self.window or 1)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("sample_rate", "encoder_dim", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if math.prod(self.encoder_strides) != math.prod(self.decoder_strides):
            raise ValueError(f"expected equal products of {self.encoder_strides=} and {self.decoder_strides=}")
        if min(self.encoder_strides, default=0) < 2 or min(self.decoder_strides, default=0) < 2:
            raise ValueError(f"expected strides of at least 2, got {self.encoder_strides} and {self.decoder_strides}")
        if self.decoder_dim < 1 or self.decoder_dim % 2 ** len(self.decoder_strides):
            raise ValueError(f"expected a decoder_dim that 2 ** {len(self.decoder_strides)} divides, got {self.decoder_dim}")
        if not self.strides or min(self.strides) < 1 or self.window < 0:
            raise ValueError(f"expected positive strides and no negative window, got {self.strides} and {self.window}")
        if self.window and (self.latent_dim % 64 or self.decoder_dim % 64):
            raise ValueError(
                f"expected widths that 64 divides where there is attention, got {self.latent_dim}, {self.decoder_dim}"
            )


class MultiRateQuantizer(nn.Module):
    """Residual stages that each see what is left at their own rate, averaged over `stride` frames."""

    stages: Any

    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        self.strides = config.strides
        self.stages = nn.ModuleList(
            FactorizedQuantizer(config.codebook_size, config.codebook_dim, config.latent_dim, commitment=config.commitment)
            for _ in config.strides
        )

    def ids(self, x: Tensor) -> list[Tensor]:
        """Ids int64 `[B, T / stride]` of each codebook, of vectors `[B, T, D]`."""
        residual, ids = x.float(), []
        for stage, stride in zip(self.stages, self.strides, strict=True):
            ids.append(stage.ids(_average(residual, stride)))
            residual = residual - stage.lookup(ids[-1]).repeat_interleave(stride, 1)
        return ids

    def lookup(self, ids: list[Tensor]) -> Tensor:
        """Vectors float32 `[B, T, D]` of the ids of all codebooks."""
        parts = [
            stage.lookup(part).repeat_interleave(stride, 1)
            for stage, part, stride in zip(self.stages, ids, self.strides, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `[B, T, D]` for training; the ids are those of the finest codebook."""
        with torch.autocast(x.device.type, enabled=False):
            residual = x.float()
            total, loss = torch.zeros_like(residual), residual.new_zeros(())
            for stage, stride in zip(self.stages, self.strides, strict=True):
                narrow, ids, entries, errors = stage.assign(_average(residual, stride))
                vectors = stage.out_proj(carry_gradient(narrow, entries, stage.gradient)).repeat_interleave(stride, 1)
                total, residual, loss = total + vectors, residual - vectors, loss + mean(errors)
            return Quantized(total, ids, loss)


def _average(x: Tensor, stride: int) -> Tensor:
    """Means `[B, T / stride, D]` over `stride` frames of `[B, T, D]`."""
    return F.avg_pool1d(x.mT, stride).mT if stride > 1 else x


PUBLISHED = FoldingAdapter(
    rules=(
        *(
            rule
            for published, ours in (("encoder.block.", "encoder."), ("decoder.model.", "decoder."))
            for rule in (
                (f"{published}{{}}.block.{{}}.block.{{}}.", f"{ours}{{}}.{{}}.block.{{}}."),
                (f"{published}{{}}.block.{{}}.", f"{ours}{{}}.{{}}."),
                (f"{published}{{}}.to_qkv.", f"{ours}{{}}.qkv."),
                (f"{published}{{}}.to_out.", f"{ours}{{}}.out."),
                (published, ours),
            )
        ),
        ("quantizer.quantizers.{}.codebook.weight", "quantizer.stages.{}.codebook"),
        ("quantizer.quantizers.", "quantizer.stages."),
    ),
    dropped={"*.rel_pos.inv_freq": "frequencies of the rotary positions, which are computed"},
    spelling=NEW_SPELLING,
    matrices=("_proj.weight",),
)


class Snac(Codec):
    """The tokenizer: K sequences of ids at different rates.

    Attributes:
        noise_seed: Of the noise that the decoder adds; `None` adds none.
    """

    architecture: ClassVar[str] = "snac"
    config_class: ClassVar[type[TokenizerConfig]] = SnacConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: SnacConfig
    decoder: Chain
    quantizer: MultiRateQuantizer
    noise_seed: int | None = 0
    whole: str = "has codebooks of several rates"

    def __init__(self, config: SnacConfig) -> None:
        super().__init__(config, sample_rate=config.sample_rate, hop=config.hop, multiple=config.hop * config.frames_together)
        self.encoder = snake_encoder(
            config.encoder_dim, config.encoder_strides, config.latent_dim, depthwise=True, window=config.window
        )
        self.decoder = snake_decoder(
            config.latent_dim,
            config.decoder_dim,
            config.decoder_strides,
            depthwise=True,
            window=config.window,
            noise=config.noise,
        )
        self.quantizer = MultiRateQuantizer(config)

    def _describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "codebook_sizes": (config.codebook_size,) * len(config.strides),
            "strides": config.strides,
            "rate": self.frame_rate,
        }

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        strides = self.config.strides
        num_frames = -(-batch.shape[-1] // self.multiple) * self.config.frames_together
        lengths = torch.tensor([num_frames // stride for stride in strides], device=batch.device)
        ids = lengths.new_zeros(len(batch), len(strides), num_frames // min(strides))
        together, waiting, at = math.lcm(*strides), None, 0
        for latents in self._latents(batch):
            waiting = latents if waiting is None else torch.cat([waiting, latents], -1)
            whole = waiting.shape[-1] // together * together
            found = self.quantizer.ids(waiting[..., :whole].mT) if whole else []
            for k, part in enumerate(found):
                start = at // strides[k]
                ids[:, k, start : start + part.shape[1]] = part
            waiting, at = waiting[..., whole:].clone(), at + whole
        return Codes(ids, lengths.expand(len(batch), -1))

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del extras
        row = lengths[0].tolist()
        covered = [n * stride for n, stride in zip(row, self.config.strides, strict=True)]
        if len(set(covered)) > 1 or covered[0] % self.config.frames_together:
            expected = ", ".join(f"n * {self.config.frames_together // stride}" for stride in self.config.strides)
            raise TokensError(f"expected codebooks of lengths {expected}, got {row}")
        return self._collect(self._pieces_of(ids, covered[0]), covered[0])

    def _pieces_of(self, ids: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Audio `[B, 1, ...]` of ids `[B, K, T]`, piece by piece."""
        together = self.config.frames_together
        size = max(together, self._piece_frames // together * together)
        state: State = {} if self.noise_seed is None else seed_noise(self.decoder, num_frames, self.noise_seed)
        for at in range(0, num_frames, size):
            end = min(at + size, num_frames)
            parts = [ids[:, k, at // stride : end // stride] for k, stride in enumerate(self.config.strides)]
            yield self.decoder(self.quantizer.lookup(parts).to(self.dtype).mT, state, end == num_frames)

    def _render(self, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        seed = int(torch.randint(1 << 31, (), generator=generator, device=generator.device if generator else None))
        return self.decoder(latents, seed_noise(self.decoder, latents.shape[-1], seed), True)

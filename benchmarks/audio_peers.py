"""The codecs' other implementations that can be installed: EnCodec, DAC and Mimi of transformers, and snac.

Each has the functions that `audio.py` asks of a peer: `encode`, `ids` and `decode`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.dac import DacConfig
from tokenzoo.tokenizers.audio.encodec import EncodecConfig
from tokenzoo.tokenizers.audio.snac import SnacConfig

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_NOT_STORED = ("inited", "initialized", "cluster_size", "embed_avg", "inv_freq")


def installed_peer(codec: Codec, state: Mapping[str, Tensor]) -> Any | None:
    """The other implementation of a codec with the weights of a published state dict; `None` where none can be imported."""
    maker = {"encodec": EncodecPeer, "dac": DacPeer, "mimi": MimiPeer, "snac": SnacPeer}.get(codec.architecture)
    try:
        return maker(codec, state) if maker else None
    except ImportError:
        return None


class _Peer:
    model: Any

    def _load(self, model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
        found = model.load_state_dict(dict(state), strict=False)
        missing = [key for key in found.missing_keys if not key.endswith(_NOT_STORED)]
        if missing or found.unexpected_keys:
            raise SystemExit(f"the weights do not fit {type(model).__name__}: {missing[:3]}, {found.unexpected_keys[:3]}")
        self.model = model.eval()


class EncodecPeer(_Peer):
    """`transformers.EncodecModel` with all codebooks."""

    def __init__(self, codec: Codec, state: Mapping[str, Tensor]) -> None:
        import transformers

        config = codec.config
        assert isinstance(config, EncodecConfig)
        self.kbps = codec.info.bits_per_second / 1000
        settings: dict[str, Any] = {"sampling_rate": config.sample_rate, "audio_channels": config.channels}
        settings |= {"target_bandwidths": [self.kbps], "use_causal_conv": config.causal}
        if config.segment:
            overlap = 1 - config.segment_stride / config.segment
            settings |= {"normalize": True, "chunk_length_s": config.segment / config.sample_rate, "overlap": overlap}
            settings |= {"norm_type": "time_group_norm"}
        self._load(transformers.EncodecModel(transformers.EncodecConfig(**settings)), state)

    def encode(self, batch: Tensor) -> Any:
        """Codes of `[B, C, S]`."""
        return self.model.encode(batch, bandwidth=self.kbps)

    def ids(self, codes: Any) -> Sequence[Tensor]:
        """One sequence `[B, T]` per codebook."""
        frames = list(codes.audio_codes)
        if codes.last_frame_pad_length:
            frames[-1] = frames[-1][..., : -codes.last_frame_pad_length]
        return torch.cat(frames, -1).unbind(1)

    def decode(self, codes: Any) -> Tensor:
        """Audio `[B, C, S]`."""
        padded = codes.last_frame_pad_length
        return self.model.decode(codes.audio_codes, codes.audio_scales, last_frame_pad_length=padded).audio_values


class DacPeer(_Peer):
    """`transformers.DacModel`."""

    def __init__(self, codec: Codec, state: Mapping[str, Tensor]) -> None:
        import transformers

        config = codec.config
        assert isinstance(config, DacConfig)
        self.hop = config.hop
        settings = transformers.DacConfig(
            sampling_rate=config.sample_rate, downsampling_ratios=list(config.strides), n_codebooks=config.num_codebooks
        )
        settings.hidden_size = config.latent_dim
        self._load(transformers.DacModel(settings), state)

    def encode(self, batch: Tensor) -> Tensor:
        """Ids `[B, K, T]` of `[B, 1, S]`."""
        return self.model.encode(F.pad(batch, (0, -batch.shape[-1] % self.hop))).audio_codes

    def ids(self, codes: Tensor) -> Sequence[Tensor]:
        """One sequence `[B, T]` per codebook."""
        return codes.unbind(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Audio `[B, 1, S]`."""
        return self.model.decode(audio_codes=codes).audio_values[:, None]


class MimiPeer(_Peer):
    """`transformers.MimiModel`, whose parts have had prefixes since release 5 that the published file lacks."""

    _PREFIXES: Mapping[str, str] = {
        "encoder.": "encoder.encoder_seanet.",
        "decoder.": "decoder.decoder_seanet.",
        "encoder_transformer.": "encoder.encoder_transformer.",
        "decoder_transformer.": "decoder.decoder_transformer.",
        "downsample.": "encoder.downsample.",
        "upsample.": "decoder.upsample.",
    }

    def __init__(self, codec: Codec, state: Mapping[str, Tensor]) -> None:
        import transformers

        self.hop = codec.hop
        nested = {}
        for key, tensor in state.items():
            head = key.partition(".")[0] + "."
            nested[self._PREFIXES.get(head, head) + key.removeprefix(head)] = tensor
        self._load(transformers.MimiModel(transformers.MimiConfig()), nested)

    def encode(self, batch: Tensor) -> Tensor:
        """Ids `[B, K, T]` of `[B, 1, S]`."""
        return self.model.encode(F.pad(batch, (0, -batch.shape[-1] % self.hop))).audio_codes

    def ids(self, codes: Tensor) -> Sequence[Tensor]:
        """One sequence `[B, T]` per codebook."""
        return codes.unbind(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Audio `[B, 1, S]`."""
        return self.model.decode(codes).audio_values


class SnacPeer(_Peer):
    """`snac.SNAC`, its noise drawn from the seed that ours has."""

    def __init__(self, codec: Codec, state: Mapping[str, Tensor]) -> None:
        import snac

        config = codec.config
        assert isinstance(config, SnacConfig)
        model = snac.SNAC(
            sampling_rate=config.sample_rate,
            encoder_dim=config.encoder_dim,
            encoder_rates=list(config.encoder_strides),
            decoder_dim=config.decoder_dim,
            decoder_rates=list(config.decoder_strides),
            attn_window_size=config.window or None,
            vq_strides=list(config.strides),
        )
        self._load(model, state)

    def encode(self, batch: Tensor) -> list[Tensor]:
        """Ids `[B, T]` of each codebook."""
        return self.model.encode(batch)

    def ids(self, codes: list[Tensor]) -> Sequence[Tensor]:
        """One sequence `[B, T]` per codebook."""
        return codes

    def decode(self, codes: list[Tensor]) -> Tensor:
        """Audio `[B, 1, S]`."""
        torch.manual_seed(0)
        return self.model.decode(codes)

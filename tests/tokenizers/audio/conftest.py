"""Fixtures that the reference implementations computed, and tiny codecs of every kind.

`<name>.state.safetensors` holds random weights under the published keys (float16 values, used as float32), and
`<name>.expected.safetensors` recordings `wave.<i>`, their ids and what these decode to, and our config and adapter.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tokenzoo.tokenizers.audio.dac import Dac, DacConfig
from tokenzoo.tokenizers.audio.encodec import Encodec, EncodecConfig
from tokenzoo.tokenizers.audio.mimi import Mimi, MimiConfig
from tokenzoo.tokenizers.audio.snac import Snac, SnacConfig
from tokenzoo.tokenizers.audio.wavtokenizer import WavTokenizer, WavTokenizerConfig
from tokenzoo.tokenizers.audio.wavtokenizer_nano import WavTokenizerNano, WavTokenizerNanoConfig

GOLDEN = Path(__file__).parents[2] / "golden"


TINY = {"sample_rate": 1000, "codebook_size": 32}
SEANET = {"ratios": (5, 2), "filters": 4, "dim": 8}
SEGMENTS = {"channels": 2, "causal": False, "norm": "time", "segment": 200, "segment_stride": 190}
NANO = {"hop": 12, "mel_bands": 16, "pitch_candidates": 24, "dim": 4, "width": 16, "hidden": 24}
RATES = {"encoder_strides": (2, 5), "decoder_strides": (5, 2), "codebook_dim": 4}

MAKERS = {
    "encodec_24khz": lambda: Encodec(EncodecConfig(**TINY, **SEANET, num_codebooks=6)),
    "encodec_48khz": lambda: Encodec(EncodecConfig(**TINY, **SEANET, **SEGMENTS, num_codebooks=6)),
    "mimi": lambda: Mimi(
        MimiConfig(**TINY | SEANET | {"dim": 16}, layers=2, hidden_dim=16, context=6, codebook_dim=8, num_codebooks=5)
    ),
    "dac": lambda: Dac(
        DacConfig(**TINY, strides=(2, 5), encoder_dim=4, latent_dim=16, decoder_dim=16, codebook_dim=4, num_codebooks=5)
    ),
    "snac_24khz": lambda: Snac(SnacConfig(**TINY, **RATES, encoder_dim=4, decoder_dim=16)),
    "snac_32khz": lambda: Snac(SnacConfig(**TINY, **RATES, encoder_dim=16, decoder_dim=64, window=4, strides=(8, 4, 2, 1))),
    "wavtokenizer": lambda: WavTokenizer(
        WavTokenizerConfig(**TINY, **SEANET, decoder_dim=16, decoder_hidden_dim=24, decoder_layers=2, groups=4)
    ),
    "wavtokenizer_nano": lambda: WavTokenizerNano(
        WavTokenizerNanoConfig(**TINY, **NANO, encoder_layers=1, decoder_layers=2, restart_after=5)
    ),
}


@pytest.fixture(scope="session")
def golden():
    def load(name, cls):
        with safe_open(GOLDEN / f"{name}.expected.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config, adapter = json.loads(file.metadata()["config"]), file.metadata()["adapter"]
        published = {key: tensor.float() for key, tensor in load_file(GOLDEN / f"{name}.state.safetensors").items()}
        tokenizer = cls(cls.config_class.from_dict(config)).eval()
        tokenizer.load_state_dict(cls.adapters[adapter].to_ours(published), strict=True)
        count = sum(key.startswith("wave.") for key in tensors)
        cases = [
            SimpleNamespace(**{key.rpartition(".")[0]: value for key, value in tensors.items() if key.endswith(f".{i}")})
            for i in range(count)
        ]
        return SimpleNamespace(tok=tokenizer, published=published, adapter=cls.adapters[adapter], cases=cases)

    return load


@pytest.fixture(params=MAKERS)
def codec(request):
    """A tiny codec with random weights, whose ids depend on what it hears."""
    return make(request.param)


def make(name):
    torch.manual_seed(0)
    tok = MAKERS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter, tensor in tok.named_parameters():
        if parameter.endswith("codebook") or parameter == "correction.weight":  # the latter is 0 before training
            tensor.data.normal_(generator=generator).mul_(0.3)
        elif tensor.dim() > 1:
            tensor.data.mul_(1.5)
    if name == "wavtokenizer_nano":  # the same
        with torch.no_grad():
            clip = torch.cat([torch.zeros(1, 1, 120), torch.randn(1, 1, 264, generator=generator) / 2], -1)
            tok.quantizer.codebook.copy_(tok.latents(tok.features(tok._heard(clip, 0, clip.shape[-1] // tok.hop)))[0])
    if name == "wavtokenizer":  # one codebook has to tell the latents of noise apart by itself
        with torch.no_grad():
            latents = tok.encoder(torch.randn(1, 1, 320, generator=generator) / 2)
        tok.quantizer.stages[0].codebook.data.copy_(latents[0].mT)
    return tok

"""Every codec against its reference implementation, with random weights in the published layout.

The references: transformers 5.23 (EnCodec, DAC, Mimi), snac 1.2.1, jishengpeng/WavTokenizer@5cf440d.
"""

import pytest
import torch

from tokenzoo.tokenizers.audio.dac import Dac
from tokenzoo.tokenizers.audio.encodec import Encodec
from tokenzoo.tokenizers.audio.mimi import Mimi
from tokenzoo.tokenizers.audio.snac import Snac
from tokenzoo.tokenizers.audio.wavtokenizer import WavTokenizer

CLASSES = {
    "encodec_24khz": Encodec,
    "encodec_48khz": Encodec,
    "dac": Dac,
    "mimi": Mimi,
    "snac_24khz": Snac,
    "snac_32khz": Snac,
    "wavtokenizer": WavTokenizer,
}
CASES = list(CLASSES.items())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def decoded(tok, tokens):
    """As `decode`, but not limited to [-1, 1]."""
    with torch.no_grad():
        return tok._decode(tokens.ids, tokens.lengths, tokens.extras)[0]


@pytest.mark.parametrize(("name", "cls"), CASES)
def test_ids_equal_the_references(golden, name, cls):
    case = golden(name, cls)
    for expected in case.cases:
        tokens = case.tok.encode(expected.wave)
        theirs = (
            list(expected.ids) if hasattr(expected, "ids") else [vars(expected)[f"ids{k}"] for k in range(len(tokens.codes()))]
        )
        assert all(torch.equal(a, b) for a, b in zip(tokens.codes(), theirs, strict=True))
        for key, scales in tokens.extras.items():
            torch.testing.assert_close(scales[0], vars(expected)[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "cls"), CASES)
def test_audio_equals_the_references(golden, name, cls):
    case = golden(name, cls)
    for expected in case.cases:
        tokens = case.tok.encode(expected.wave)
        ours, count = decoded(case.tok, tokens), expected.audio.shape[1]
        close(ours[:, :count], expected.audio)
        assert ours.shape[1] >= expected.wave.shape[1]
        if hasattr(expected, "short"):
            close(decoded(case.tok, tokens.truncate(2))[:, :count], expected.short)
        if hasattr(expected, "quiet"):
            case.tok.noise_seed = None
            close(decoded(case.tok, tokens)[:, :count], expected.quiet)
            case.tok.noise_seed = 0


@pytest.mark.parametrize(("name", "cls"), CASES)
def test_weights_go_back_to_the_published_layout(golden, name, cls):
    case = golden(name, cls)
    ours = case.tok.state_dict()
    back = case.adapter.to_published(ours)
    dropped = (".inited", ".initialized", ".cluster_size", ".embed_avg", ".window", ".inv_freq")
    assert back.keys() == {key for key in case.published if not key.endswith(dropped)}
    again = case.adapter.to_ours(back)
    assert again.keys() == ours.keys()
    assert all(torch.allclose(ours[key], again[key], rtol=1e-5) for key in ours)


ORIGINAL = {
    "encodec_24khz": """
        encoder.model.1.block.3.conv.conv.weight_v encoder.model.4.shortcut.conv.conv.bias encoder.model.7.lstm.bias_hh_l1
        decoder.model.3.convtr.convtr.weight_g quantizer.vq.layers.7._codebook.embed
    """,
    "mimi": """
        encoder.model.1.block.1.conv.conv.weight encoder_transformer.transformer.layers.1.self_attn.in_proj_weight
        decoder_transformer.transformer.layers.0.layer_scale_1.scale upsample.convtr.convtr.convtr.weight
        quantizer.rvq_first.vq.layers.0._codebook.embedding_sum quantizer.rvq_rest.input_proj.weight
    """,
    "dac": """
        encoder.block.2.block.1.block.0.alpha encoder.block.6.weight_g decoder.model.1.block.1.weight_v
        quantizer.quantizers.5.out_proj.weight_v quantizer.quantizers.0.codebook.weight decoder.model.5.alpha
    """,
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_original_layouts_are_read_too(golden, name):
    ours = golden(name, CLASSES[name]).tok.state_dict()
    adapter = CLASSES[name].adapters["original"]
    published = adapter.to_published(ours)
    assert set(ORIGINAL[name].split()) <= published.keys()
    again = adapter.to_ours(published)
    assert again.keys() == ours.keys()
    assert all(torch.allclose(ours[key], again[key], rtol=1e-5) for key in ours)

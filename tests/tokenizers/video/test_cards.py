"""The cards of video tokenizers describe networks that can be built, of the size they say."""

import functools

import pytest
import torch

from tokenzoo.registry import cards, find_card, tokenizer_class

CARDS = {name: card for name, card in cards().items() if card.modality == "video" or card.architecture == "cosmos_image"}
PUBLISHED = {name: card for name, card in CARDS.items() if not card.bundled}
GRIDS = {name: card for name, card in PUBLISHED.items() if card.architecture in ("cosmos", "cosmos_image", "vidtok")}


@functools.cache
def built(name):
    cls = tokenizer_class(CARDS[name].architecture)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(CARDS[name].config))


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card, tokenizer = CARDS[name], built(name)
    assert sum(p.numel() for p in tokenizer.parameters()) == card.params
    assert card.modality == tokenizer.modality
    size = getattr(tokenizer.config, "image_size", None)
    assert size is None or f"{size} x {size}" in card.body


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout_is_that_of_the_network(name):
    tokenizer = built(name)
    adapter = tokenizer.adapters[PUBLISHED[name].source.adapter]
    assert adapter.to_ours(adapter.to_published(tokenizer.state_dict())).keys() == tokenizer.state_dict().keys()


@pytest.mark.parametrize("name", GRIDS)
def test_names_say_the_strides_and_codes(name):
    tokenizer = built(name)
    (size,) = tokenizer._describe()["codebook_sizes"]
    config = tokenizer.config
    if name.startswith("cosmos_di"):
        assert name.startswith(f"cosmos_di{config.stride}x{config.stride}.")
    elif name.startswith("cosmos"):
        assert name.startswith(f"cosmos_dv{config.frame_stride}x{config.stride}x{config.stride}.")
    else:
        assert f"causal_{config.frame_stride}{config.stride}{config.stride}_{size}.{config.version.replace('.', '_')}" in name
    assert size == 64000 or name.startswith("vidtok")


def test_sizes_on_the_hub():
    """In MB: encoder.jit and decoder.jit together are 211.6, 214 and 224.3, code included."""
    stored = {"cosmos_dv4x8x8.v0_1": 211.6, "cosmos_dv8x8x8.v0_1": 214.0, "cosmos_dv8x16x16.v0_1": 224.3}
    for name, size in stored.items():
        assert CARDS[name].params * 2e-6 == pytest.approx(size, rel=0.02)


def test_sizes_are_those_of_the_references():
    """Parameters of OmniTokenizer's encoder, of LARP without its prior, and of the 20 tensors of VQToken's attention."""
    omni = built("omnitokenizer.imagenet_k600")
    assert sum(p.numel() for p in omni.encoder.parameters()) == pytest.approx(25.8e6, rel=0.01)
    assert CARDS["larp_l_long.k600_ucf"].params == pytest.approx(172.18e6, rel=1e-4)
    attention = built("vqtoken_0_5b.llava_ov").attention.state_dict()
    assert (len(attention), sum(t.numel() for t in attention.values())) == (20, 10_762_112)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("cosmos_dv8x16x16", "cosmos_dv8x16x16.v0_1"),
        ("cosmos_di8x8", "cosmos_di8x8.v0_1"),
        ("vidtok_causal_488_32768", "vidtok_causal_488_32768.v1_0"),
        ("omnitokenizer", "omnitokenizer.imagenet_k600"),
        ("vqtoken_0_5b", "vqtoken_0_5b.llava_ov"),
    ],
)
def test_default_tags(variant, name):
    assert find_card(variant).name == name


def test_licences():
    """Weights whose licence is not known, and no others, are left out of what may be used commercially."""
    unknown = {name for name, card in CARDS.items() if not card.commercial}
    assert unknown == {"larp_l_long.k600_ucf", "vqtoken_0_5b.llava_ov", "vqtoken_0_5b.llava_ov_adaptive"}
    assert all(CARDS[name].license == "unknown" for name in unknown)

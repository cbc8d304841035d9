"""The bundled VQToken does its work without a network."""

import numpy as np
import pytest
import torch

import tokenzoo
from tokenzoo.registry import cards
from tokenzoo.tokenizers import Tokens, TokensError


@pytest.fixture
def tok(no_network):
    return tokenzoo.load("vqtoken_nano")


def halves(frames=4):
    """A clip, uint8 `[T, 96, 128, 3]`: a checkerboard that moves on the left, a smooth slope on the right."""
    rows, columns = np.mgrid[:96, :128]
    clip = np.zeros((frames, 96, 128, 3), np.uint8)
    for t in range(frames):
        board = ((rows // 4 + (columns + t) // 4) % 2 * 200).astype(np.uint8)
        clip[t] = np.where((columns < 64)[..., None], board[..., None], np.stack([columns, rows, 255 - columns], -1))
    return clip


def test_what_differs_gets_other_tokens_and_what_is_alike_the_same(tok):
    tokens = tok.encode(halves(), length=4)
    assert tokens.extras["clusters"].tolist() == [4]
    ids = tokens.ids.reshape(4, 14, 14)
    left, right = ids[:, 1:-1, 1:6], ids[:, 1:-1, 8:13]
    assert not set(left.flatten().tolist()) & set(right.flatten().tolist())
    assert (ids[1:] == ids[:-1]).float().mean() > 0.8


def test_it_decodes_to_features_near_those_of_the_patches(tok):
    tokens = tok.encode(halves())
    (decoded,) = tok.decode(Tokens.unpack(tokens.pack()))
    assert decoded.shape == (4, 14, 14, 64)
    with torch.no_grad():
        seen = tok.features(tok.sized(torch.from_numpy(halves()).permute(0, 3, 1, 2).float() / 255))
    near = torch.nn.functional.cosine_similarity(decoded.flatten(1, 2), seen, dim=-1)
    assert near.mean() > 0.8


def test_the_adaptive_card_has_the_same_weights_and_chooses(tok):
    adaptive = tokenzoo.load("vqtoken_nano.clips_adaptive")
    assert all(torch.equal(value, tok.state_dict()[name]) for name, value in adaptive.state_dict().items())
    flat = np.full((2, 40, 40, 3), 90, np.uint8)
    found = adaptive.encode([halves(12), flat])
    assert all(12 <= count <= 32 for count in found.extras["clusters"].tolist())
    assert adaptive.encode(halves(12), length=17).extras["clusters"].tolist() == [17]
    with pytest.raises(TokensError, match="1 to 32 tokens"):
        adaptive.encode(halves(), length=33)


def test_both_cards_name_one_file():
    mine = [card for card in cards().values() if card.variant == "vqtoken_nano"]
    assert [card.name for card in mine] == ["vqtoken_nano.clips", "vqtoken_nano.clips_adaptive"]
    assert len({(card.source.file, card.source.sha256, card.params) for card in mine}) == 1
    assert all(card.commercial and card.bundled for card in mine)

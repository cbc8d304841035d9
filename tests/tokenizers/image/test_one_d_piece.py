import pytest
import torch

from tokenzoo.tokenizers import ConfigError, Quality, TokensError
from tokenzoo.tokenizers.image.one_d_piece import OneDPiece, OneDPieceConfig

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 12,
    "codebook_size": 32,
    "token_dim": 6,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 16), ("layers", 2), ("heads", 2))},
    "pixel_codebook_size": 8,
    "pixel_dim": 6,
    "pixel_channels": 32,
    "pixel_multipliers": (1, 1, 1),
    "pixel_blocks": 1,
}


@pytest.fixture
def tok():
    torch.manual_seed(0)
    return OneDPiece(OneDPieceConfig(**TINY)).eval()


@pytest.mark.parametrize("length", [1, 2, 5, 11, 16])
def test_every_prefix_decodes_as_in_the_reference(golden, length):
    case = golden("one_d_piece", OneDPiece, state="titok_legacy")
    tokens = case.tok.encode(case.images, length=length)
    assert torch.equal(tokens.ids, case.expected["ids"][..., :length])
    expected = case.expected[f"reconstruction_{length}"].clamp(0, 1)
    torch.testing.assert_close(torch.stack(case.tok.decode(tokens)), expected, rtol=0, atol=1e-4)


def test_encoding_to_a_length_equals_truncating(tok):
    images = torch.rand(3, 3, 16, 16)
    whole = tok.encode(images)
    assert whole.lengths.flatten().tolist() == [12, 12, 12]
    assert tok.encode(images, length=5).equal(whole.truncate(5))
    assert tok.encode(images, length=[1, 12, 7]).equal(whole.truncate([1, 12, 7]))


def test_items_of_one_batch_may_differ_in_length(tok):
    tokens = tok.encode(torch.rand(4, 3, 20, 16), length=[3, 12, 3, 1])
    together = tok.decode(tokens)
    for i in range(4):
        assert torch.equal(together[i], tok.decode(tokens[i])[0])
    assert tokens.bits.tolist() == [15, 60, 15, 5]


@pytest.mark.parametrize("length", [0, 13, -1])
def test_lengths_out_of_range_are_refused(tok, length):
    with pytest.raises(TokensError, match="1 to 12"):
        tok.encode(torch.rand(3, 16, 16), length=length)


class Brightening(OneDPiece):
    """A white picture, the better the more tokens there are."""

    def _decode(self, ids, lengths, extras):
        level = lengths[:, 0] / self.config.num_tokens
        return level[:, None, None, None].expand(-1, 3, 16, 16)


@pytest.mark.parametrize("target", [{"psnr": db} for db in (0.5, 1, 5, 9, 15, 20, 99)] + [{"l1": 0.3}, {"psnr": 5, "l1": 0.2}])
def test_target_finds_the_shortest_prefix(target):
    tok = Brightening(OneDPieceConfig(**TINY)).eval()
    white = torch.ones(2, 3, 16, 16)
    tokens = tok.encode(white, target=target)

    def meets(n):
        image = torch.stack(tok.decode(tok.encode(white, length=n)))
        values = {name: tok.qualities[name].measure(image, white) for name in target}
        return all(bool(tok.qualities[name].meets(values[name], target[name]).all()) for name in target)

    exhaustive = next((n for n in range(1, 13) if meets(n)), 12)
    assert tokens.lengths.flatten().tolist() == [exhaustive, exhaustive]
    assert all(meta["target"]["met"] == meets(exhaustive) for meta in tokens.meta)


def test_target_takes_a_measure_of_the_users(tok):
    tok.qualities["tokens"] = Quality(lambda a, b: a.flatten(1).std(1) * 0 + 1, higher_is_better=True)
    assert tok.encode(torch.rand(3, 16, 16), target={"tokens": 1}).lengths.tolist() == [[1]]


def test_training_sees_prefixes_of_all_lengths(tok, monkeypatch):
    seen = []
    forward = tok.decoder.forward
    monkeypatch.setattr(tok.decoder, "forward", lambda vectors: seen.append(vectors.shape[1]) or forward(vectors))
    generator, batch = torch.Generator().manual_seed(0), torch.rand(1, 3, 16, 16)
    tok(batch)
    assert seen == [12]
    tok.train()
    for _ in range(150):
        with torch.no_grad():
            tok(batch, generator=generator)
    assert set(seen) == set(range(1, 13))


def test_training_learns():
    torch.manual_seed(0)
    tok = OneDPiece(OneDPieceConfig(**TINY)).train()
    batch = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16).contiguous()
    optimizer = torch.optim.Adam(tok.parameters(), lr=3e-3)
    generator, history = torch.Generator().manual_seed(0), []
    for _ in range(40):
        output = tok(batch, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append(float(output.losses["reconstruction"].detach()))
    assert history[-1] < 0.6 * history[0]


def test_gaussian_vectors_have_no_prefix():
    with pytest.raises(ConfigError, match="'vq'"):
        OneDPieceConfig.from_dict({**TINY, "legacy": False, "quantizer": "vae"})

import pytest
import torch

from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.image.retok import ReToK, ReToKConfig

TINY = {
    "image_size": 16,
    "num_tokens": 8,
    "num_padding": 6,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 16), ("layers", 2), ("heads", 2))},
    "feature_dim": 8,
    "channels": 32,
    "multipliers": (1, 1, 1),
    "blocks": 1,
    "token_dim": 4,
    "codebook_size": 32,
    "alignment_layer": 1,
}


def tiny(**changes):
    torch.manual_seed(0)
    return ReToK(ReToKConfig(**{**TINY, **changes})).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- parity


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_every_prefix_decodes_as_in_the_reference(golden, length):
    case = golden("retok", ReToK)
    tokens = case.tok.encode(case.images, length=length)
    assert torch.equal(tokens.ids, case.expected["ids"][..., :length])
    expected = case.expected[f"reconstruction_{length}"]
    vectors = case.tok.quantizer.lookup(case.expected["ids"][:, 0, :length])
    with torch.no_grad():
        close(case.tok._paint(case.tok.token_decoder(vectors)[0]), expected)
    close(torch.stack(case.tok.decode(tokens)), expected.clamp(0, 1))
    assert torch.equal(case.tok._encode(case.images / 255, length=None, seed=0).ids, case.expected["ids"])


def test_the_padded_sequence_is_the_references(golden):
    """What only training sees: ids of the padding, and what a prefix that reaches into it decodes to."""
    case = golden("retok", ReToK)
    with torch.no_grad():
        vectors = case.tok.token_encoder(case.tok.conv_encoder(2 * (case.images / 255) - 1), padding=True)
        ids = case.tok.quantizer.ids(vectors)
        assert torch.equal(ids, torch.cat([case.expected["ids"][:, 0], case.expected["padding_ids"]], 1))
        features, _ = case.tok.token_decoder(case.tok.quantizer.lookup(ids[:, :11]))
        close(case.tok._paint(features), case.expected["padded_11"])


def test_the_aligned_layer_is_the_references(golden):
    case = golden("retok", ReToK)
    config = ReToKConfig(**{**case.tok.config.to_dict(), "multipliers": (2, 1), "alignment_dim": 5, "alignment_network": "any"})
    tok = ReToK(config).eval()
    mlp = {key.removeprefix("s1to2decoder.distill_mlp."): v for key, v in case.published.items() if "distill_mlp" in key}
    tok.alignment.load_state_dict(mlp)
    assert not tok.load_state_dict(case.tok.state_dict(), strict=False).unexpected_keys
    ids = torch.cat([case.expected["ids"][:, 0], case.expected["padding_ids"]], 1)[:, :11]
    with torch.no_grad():
        _, tapped = tok.token_decoder(tok.quantizer.lookup(ids))
        close(tok.alignment(tapped), case.expected["aligned_11"])


def test_weights_go_back_to_the_published_layout(golden):
    case = golden("retok", ReToK)
    back = ReToK.adapters["published"].to_published(case.tok.state_dict())
    dropped = {key for key in case.published if "distill_mlp" in key or key == "quantize.codebook_used"}
    assert len(dropped) == 7
    assert back.keys() == case.published.keys() - dropped
    conv = {"s2to1encoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight"}
    assert all(back[key].dim() == 4 for key in conv)
    assert all(torch.equal(back[key], case.published[key]) for key in back)


def test_a_published_key_that_nobody_knows_is_not_ignored(golden):
    case = golden("retok", ReToK)
    ours = ReToK.adapters["published"].to_ours({**case.published, "s2to1encoder.query_1d": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="query_1d"):
        case.tok.load_state_dict(ours)


# -- configs


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 12},
        {"num_tokens": 128},
        {"num_padding": 9},
        {"image_size": 18},
        {"image_size": 4},
        {"channels": 24},
        {"multipliers": ()},
        {"encoder_heads": 3},
        {"decoder_layers": 0},
        {"alignment_layer": 3},
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        ReToKConfig.from_dict({**TINY, **changes})


# -- encode and decode


def test_items_of_a_list_get_what_they_get_alone():
    tok = tiny()
    images = [torch.rand(3, 16 + 9 * i, 50 - 7 * i) for i in range(3)]
    together = tok.encode(images, length=[8, 3, 1])
    decoded = tok.decode(together)
    for i, image in enumerate(images):
        alone = tok.encode(image, length=int(together.lengths[i, 0]))
        assert torch.equal(alone.ids[0, 0], together.ids[i, 0, : alone.ids.shape[2]])
        assert torch.equal(tok.decode(alone)[0], decoded[i])
        assert decoded[i].shape[1:] == (min(image.shape[1:]),) * 2


def test_encoding_to_a_length_equals_truncating():
    tok = tiny()
    images = torch.rand(2, 3, 16, 16)
    whole = tok.encode(images)
    assert whole.lengths.flatten().tolist() == [8, 8]
    assert tok.encode(images, length=5).equal(whole.truncate(5))
    for length in (0, 9):
        with pytest.raises(TokensError, match="1 to 8"):
            tok.encode(images, length=length)


def test_the_last_layer_computes_only_what_is_read():
    tok = tiny()
    features = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        close(tok.token_encoder(features, padding=True)[:, :8], tok.token_encoder(features, padding=False))


def test_target_finds_the_shortest_prefix():
    """Bisection over a decoder whose pictures get closer to white with every token."""

    class Brightening(ReToK):
        def _decode(self, ids, lengths, extras):
            return (lengths[:, 0] / self.config.num_tokens)[:, None, None, None].expand(-1, 3, 16, 16)

    torch.manual_seed(0)
    tok, white = Brightening(ReToKConfig(**TINY)).eval(), torch.ones(2, 3, 16, 16)
    for wanted, shortest, met in ((0.9, 1, True), (0.5, 4, True), (0.3, 6, True), (0.1, 8, True), (-1.0, 8, False)):
        tokens = tok.encode(white, target={"l1": wanted})
        assert tokens.lengths.flatten().tolist() == [shortest, shortest]
        assert [meta["target"]["met"] for meta in tokens.meta] == [met, met]


def test_bfloat16():
    tok = tiny().to(torch.bfloat16)
    assert tok.decode(tok.encode(torch.rand(2, 3, 16, 16)))[0].dtype == torch.float32


# -- training


def coarse(images):
    """Stands for a frozen vision network: the mean colour of each cell, `[B, 16, 3]`."""
    return torch.nn.functional.avg_pool2d(images, images.shape[-1] // 4).flatten(2).transpose(1, 2)


def test_every_length_of_the_padded_sequence_is_trained_and_reaches_every_weight():
    tok, seen = tiny(alignment_network="any", alignment_dim=3).train(), []
    tok.features = coarse
    forward = tok.token_decoder.forward
    tok.token_decoder.forward = lambda vectors: seen.append(vectors.shape[1]) or forward(vectors)
    generator, batch = torch.Generator().manual_seed(0), torch.rand(2, 3, 16, 16)
    for _ in range(60):
        tok(batch, generator=generator).loss.backward()
    assert set(seen) == set(range(1, 15))
    assert not [name for name, p in tok.named_parameters() if p.grad is None or not p.grad.any()]
    tok.eval()
    tok(batch)
    assert seen[-1] == 8


def test_alignment_weighs_less_towards_the_tail(monkeypatch):
    tok = tiny(alignment_network="any", alignment_dim=3).train()
    tok.features = coarse
    batch, weights = torch.rand(2, 3, 16, 16), {}
    for kept in (1, 7, 14):
        monkeypatch.setattr(tok, "_training_length", lambda generator, kept=kept: kept)
        output = tok(batch)
        weights[kept] = float(output.losses["alignment"].detach() / output.metrics["alignment_distance"])
    assert weights[1] == pytest.approx(0.5)
    assert weights[7] == pytest.approx(0.5 * 7 / 13)
    assert weights[14] == 0


def test_without_a_network_there_is_no_alignment_and_other_shapes_are_refused():
    batch = torch.rand(2, 3, 16, 16)
    assert "alignment" not in tiny().train()(batch).losses
    tok = tiny(alignment_network="any", alignment_dim=4).train()
    tok.features = coarse
    with pytest.raises(ConfigError, match=r"\(2, 16, 4\) of any, got \(2, 16, 3\)"):
        tok(batch)


def test_the_alignment_network_is_loaded_by_its_name_and_not_saved():
    tok = tiny(alignment_network="no_such_network", alignment_dim=3).train()
    with pytest.raises(ValueError, match="no_such_network"):
        tok(torch.rand(2, 3, 16, 16))
    tok.features = coarse
    assert {key.split(".")[0] for key in tok.state_dict()} == {
        *("alignment", "conv_encoder", "token_encoder", "quantizer", "token_decoder", "conv_decoder"),
    }


def test_training_learns():
    """Eight flat colours from the padded sequence, aligned with their mean: every loss falls."""
    config = {"image_size": 8, "multipliers": (1, 1), "codebook_size": 16, "kmeans_iterations": 5, "restart_after": 5}
    tok = tiny(alignment_network="any", alignment_dim=3, direct_until=1.0, **config).train()
    tok.features = coarse
    batch = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(8, 3, 8, 8).contiguous()
    optimizer = torch.optim.Adam(tok.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(80):
        output = tok(batch, progress=step / 80, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(tok.parameters(), 1.0)
        optimizer.step()
        values = (output.losses["reconstruction"], output.losses["direct"], output.metrics["alignment_distance"])
        history.append(torch.stack(values).detach())
    start, end = torch.stack(history[:5]).mean(0), torch.stack(history[-5:]).mean(0)
    assert (end < torch.tensor([0.65, 0.3, 0.6]) * start).all()


def test_preprocessing_halves_large_pictures_first():
    """ADM's centre crop: a picture of twice the size or more is averaged over 2 x 2 pixels before it is resized."""
    picture = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    read, meta = tiny().media.read(picture.numpy())
    means = picture.permute(2, 0, 1).float().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))[:, :, 4:20]
    torch.testing.assert_close(255 * read, means, rtol=0, atol=1.01)
    assert meta == {"size": [32, 32], "source_size": [32, 48]}
    floats, _ = tiny().media.read(picture.permute(2, 0, 1) / 255)
    torch.testing.assert_close(255 * floats, means, rtol=0, atol=1e-3)

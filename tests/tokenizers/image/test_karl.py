import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.image.karl import KARL, KARLConfig

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 16,
    "num_slots": 32,
    "position_size": 8,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 24), ("layers", 2), ("heads", 2))},
    "token_dim": 6,
    "codebook_size": 32,
    "halting_dim": 12,
    "pixel_dim": 6,
    "pixel_codebook_size": 8,
    "pixel_channels": 32,
    "pixel_multipliers": (1, 1, 1),
    "pixel_blocks": 2,
}
KL = {"pixel": "kl16", "image_size": 64, "patch_size": 16, "pixel_multipliers": (1,) * 5, "pixel_blocks": 1}
KINDS = {
    "vqgan_vq": {},
    "vqgan_continuous": {"quantizer": "none"},
    "vae_vq": KL,
    "vae_continuous": {**KL, "quantizer": "none"},
}


def tiny(kind="vqgan_vq", **changes):
    """A tokenizer whose halting varies from token to token and with the asked error."""
    torch.manual_seed(0)
    tok = KARL(KARLConfig(**{**TINY, **KINDS[kind], **changes})).eval()
    with torch.no_grad():
        for name, parameter in tok.named_parameters():
            if name.startswith(("encoder", "decoder")) and parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        tok.encoder.level_embedding.normal_(std=3)
        images = pictures(tok)
        logits = tok.encoder(images, tok.pixel.features(images, None), torch.tensor([4, 8, 9]), tok.config.num_tokens).halting
        last = tok.encoder.halting[2]
        last.weight.mul_(3 / logits.std())
        last.bias.copy_(1.1 - 3 * logits.mean() / logits.std())
    return tok


def pictures(tok, count=3):
    """Flat ones, patterned ones and noise, in turn: unlike enough to keep other tokens."""
    size, generator = tok.config.image_size, torch.Generator().manual_seed(1)
    cells = [torch.rand(1, 3, size // side, size // side, generator=generator) for side in (size, 4, 1)]
    return torch.cat([F.interpolate(cells[i % 3], size=(size, size)) for i in range(count)])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- parity


@pytest.mark.parametrize("name", ["karl_vqgan", "karl_vae"])
@pytest.mark.parametrize(("error", "budget"), [(0.05, 16), (0.03, 16), (0.005, 6), (0.5, 16)])
def test_tokens_and_images_equal_the_references(golden, name, error, budget):
    case = golden(name, KARL, adapter=name.removeprefix("karl_"))
    asked = {"length": budget} if budget < 16 else {"target": {"l1": error}}
    tokens = case.tok.encode(case.images, **asked)
    kept = case.expected[f"kept_{error}_{budget}"]
    assert torch.equal(tokens.extras["kept"], kept)
    assert not all(bool((mask.long().diff() <= 0).all()) for mask in kept)  # not only first ones are kept
    codes = case.tok.encode_at(case.images / 255, error=error, budget=budget)
    if name == "karl_vqgan":
        for i in range(3):
            ids = case.expected[f"ids_{error}_{budget}"][i][kept[i]]
            assert torch.equal(tokens[i].ids[0, 0], ids)
            assert torch.equal(codes.ids[i, 0, : len(ids)], ids)
    else:
        close(tokens.extras["vectors"], case.expected[f"vectors_{error}_{budget}"])
        close(codes.extras["vectors"], case.expected[f"vectors_{error}_{budget}"])
    expected = case.expected[f"reconstruction_{error}_{budget}"]
    decoded = torch.stack(case.tok.decode(tokens))[: len(expected)]
    close(decoded, expected.clamp(0, 1))


@pytest.mark.parametrize("name", ["karl_vqgan", "karl_vae"])
def test_weights_go_back_to_the_published_layout(golden, name):
    adapter = name.removeprefix("karl_")
    case = golden(name, KARL, adapter=adapter)
    back = KARL.adapters[adapter].to_published(case.tok.state_dict())
    assert back.keys() == case.published.keys()
    assert all(torch.equal(back[key], case.published[key]) for key in back)
    with_networks = {**case.published, "gan_losses.3.discriminator.main.0.weight": torch.zeros(1)}
    assert KARL.adapters[adapter].to_ours(with_networks).keys() == case.tok.state_dict().keys()
    with pytest.raises(RuntimeError, match="register_tokens"):
        case.tok.load_state_dict(KARL.adapters[adapter].to_ours({**case.published, "register_tokens": torch.zeros(1)}))


# -- the kept set


@pytest.mark.parametrize("kind", KINDS)
def test_an_asked_error_is_answered_in_one_pass(kind, monkeypatch):
    tok = tiny(kind)
    images, calls = pictures(tok), []
    forward = tok.encoder.forward
    monkeypatch.setattr(tok.encoder, "forward", lambda *args: calls.append(len(args[0])) or forward(*args))
    monkeypatch.setattr(tok, "_decode", lambda *args: pytest.fail("something was decoded"))
    tokens = tok.encode(images, target={"l1": 0.051})
    assert calls == [1, 1, 1]
    assert [meta["target"] for meta in tokens.meta] == [{"asked": 0.051, "level": 0.06}] * 3
    kept = tokens.extras["kept"]
    assert kept.shape == (3, 16)
    assert len({tuple(row) for row in kept.tolist()}) > 1
    if kind.endswith("vq"):
        assert tokens.lengths[:, 0].tolist() == kept.sum(1).tolist()
    else:
        assert tokens.lengths.shape == (3, 0)
        assert torch.equal(tokens.extras["vectors"].any(2), kept)


def test_what_is_kept_is_what_the_halting_network_says():
    tok = tiny()
    images = pictures(tok)
    latents = tok.encoder(images, tok.pixel.encoder(images), torch.tensor([5, 5, 5]), 16)
    kept = latents.halting.sigmoid() <= 0.75
    tokens = tok.encode(images, target={"l1": 0.05})
    assert torch.equal(tokens.extras["kept"], kept)
    ids = tok.quantizer.ids(latents.vectors)
    for i in range(3):
        assert torch.equal(tokens[i].ids[0, 0], ids[i][kept[i]])


def test_the_asked_error_changes_what_is_kept_and_is_rounded_up_to_a_level():
    tok = tiny()
    images = pictures(tok)
    kept = {error: tok.encode(images, target={"l1": error}).extras["kept"] for error in (0.001, 0.005, 0.0301, 0.04, 0.38, 9)}
    assert torch.equal(kept[0.001], kept[0.005])
    assert torch.equal(kept[0.0301], kept[0.04])
    assert torch.equal(kept[0.38], kept[9])
    assert len({tuple(mask.flatten().tolist()) for mask in kept.values()}) == 3
    assert tok.encode(images).equal(dataclasses.replace(tok.encode(images, target={"l1": 0.05}), meta=tok.encode(images).meta))


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_is_what_the_encoder_gets(kind):
    tok = tiny(kind)
    images = pictures(tok)
    tokens = tok.encode(images, length=[5, 16, 5])
    assert not tokens.extras["kept"][[0, 2], 5:].any()
    for i, budget in enumerate([5, 16, 5]):
        alone = tok.encode(images[i], length=budget)
        assert torch.equal(alone.extras["kept"], tokens[i].extras["kept"])
        assert torch.equal(alone.ids, tokens[i].ids)
    assert torch.equal(
        tok.encode_at(images, error=0.001, budget=5).extras["kept"][0], tok.encode(images[0], length=5).extras["kept"][0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_whose_every_token_is_halted_keeps_one(kind):
    tok = tiny(kind)
    with torch.no_grad():
        tok.encoder.halting[2].bias.fill_(1e4)
    tokens = tok.encode(pictures(tok))
    assert tokens.extras["kept"].sum(1).tolist() == [1, 1, 1]
    assert all(image.isfinite().all() for image in tok.decode(tokens))


# -- batches


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_a_list_get_what_they_get_alone(kind):
    tok = tiny(kind)
    images = [torch.rand(3, 64 + 5 * i, 90 - 7 * i) for i in range(3)]
    together = tok.encode(images, target={"l1": 0.1})
    decoded = tok.decode(together)
    for i, image in enumerate(images):
        alone = tok.encode(image, target={"l1": 0.1})
        assert alone.equal(together[i])
        assert torch.equal(tok.decode(alone)[0], decoded[i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_batch_gets_the_same_within_rounding(kind):
    """On an accelerator several images go through the network at once, and keep different numbers of tokens."""
    tok = tiny(kind)
    images = pictures(tok)
    codes = tok.encode_at(images, error=0.1, budget=16)
    alone = [tok.encode(image, target={"l1": 0.1}) for image in images]
    assert len({int(n) for n in codes.extras["kept"].sum(1)}) > 1
    for i in range(3):
        assert torch.equal(codes.extras["kept"][i], alone[i].extras["kept"][0])
        if tok.quantizer is not None:
            assert torch.equal(codes.ids[i, 0, : len(alone[i].ids[0, 0])], alone[i].ids[0, 0])
    lengths = torch.zeros(3, 0, dtype=torch.long) if codes.lengths is None else codes.lengths
    if tok.quantizer is not None:
        lengths = lengths.clamp(max=int(lengths.min()))
        alone = [one.truncate(int(lengths.min())) for one in alone]
        codes = codes._replace(ids=codes.ids[..., : int(lengths.min())])
    decoded = tok._decode(codes.ids, lengths, codes.extras)
    for i in range(3):
        torch.testing.assert_close(decoded[i], tok.decode(alone[i], native=True)[0], rtol=0, atol=5e-4)


def test_leaving_tokens_out_equals_masking_them():
    """Halted tokens see nothing and are not seen, which is how the reference leaves them out."""
    tok = tiny()
    vectors, places = torch.randn(2, 16, 6), torch.arange(16).expand(2, -1)
    kept = torch.rand(2, 16) < 0.5
    masked = tok.decoder(vectors, places, kept)
    for i in range(2):
        left = tok.decoder(vectors[i : i + 1, kept[i]], places[i : i + 1, kept[i]])
        close(masked[i], left[0])


# -- tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_and_loaded_batch_decodes_alike(kind, tmp_path):
    tok = tiny(kind)
    tokens = tok.encode(torch.rand(2, 3, 70, 64), target={"l1": 0.1})
    tokens.save(tmp_path / "tokens.tok")
    images = tok.decode(tokens)
    assert all(image.shape == (3, 64, 64) and image.min() >= 0 and image.max() <= 1 for image in images)
    for a, b in zip(images, tok.decode(Tokens.load(tmp_path / "tokens.tok")), strict=True):
        assert torch.equal(a, b)


def test_cut_tokens_keep_their_first_places():
    tok = tiny()
    tokens = tok.encode(pictures(tok), target={"l1": 0.1})
    cut = tokens.truncate(3)
    expected = dataclasses.replace(cut, extras={"kept": tokens.extras["kept"] & (tokens.extras["kept"].cumsum(1) <= 3)})
    for a, b in zip(tok.decode(cut), tok.decode(expected), strict=True):
        assert torch.equal(a, b)


def test_ids_need_their_places_unless_all_are_there():
    tok = tiny()
    tokens = tok.encode(pictures(tok, 1), target={"l1": 0.1})
    assert tokens.lengths[0, 0] < 16
    flat = tokens.flatten("interleaved")
    with pytest.raises(TokensError, match=r"got none: tokens of KARL .* extras"):
        tok.decode(Tokens.unflatten(flat, tok.info, "interleaved"))
    carried = Tokens.unflatten(flat, tok.info, "interleaved", extras=tokens.extras)
    assert torch.equal(tok.decode(carried)[0], tok.decode(dataclasses.replace(tokens, meta=carried.meta))[0])
    plain = Tokens(torch.randint(32, (1, 1, 16)), torch.tensor([[16]]), tok.info)
    masked = dataclasses.replace(plain, extras={"kept": torch.ones(1, 16, dtype=torch.bool)})
    assert torch.equal(tok.decode(plain)[0], tok.decode(masked)[0])


def test_masks_and_vectors_that_do_not_fit_are_refused():
    tok = tiny()
    tokens = tok.encode(pictures(tok, 1), target={"l1": 0.1})
    kept = tokens.extras["kept"]
    for wrong in (kept[:, :5], kept.long(), torch.zeros_like(kept)):
        with pytest.raises(TokensError, match="kept"):
            tok.decode(dataclasses.replace(tokens, extras={"kept": wrong}))
    tok = tiny("vqgan_continuous")
    tokens = tok.encode(pictures(tok, 1))
    extras = tokens.extras
    for wrong in (
        {},
        {"kept": extras["kept"]},
        {**extras, "vectors": extras["vectors"][:, :4]},
        {"vectors": extras["vectors"]},
    ):
        with pytest.raises(TokensError, match="extras"):
            tok.decode(dataclasses.replace(tokens, extras=wrong))
    with pytest.raises(TokensError, match="continuous"):
        tokens.truncate(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"psnr": 20}}, r"target=\{'l1': \.\.\.\}, and nothing else"),
        ({"target": {"l1": 0.1, "ssim": 0.5}}, "nothing else"),
        ({"target": {"l1": 0}}, r"positive|finite"),
        ({"target": {"l1": "low"}}, r"positive|finite"),
        ({"target": {"l1": True}}, r"positive|finite"),
        ({"target": {"l1": math.inf}}, r"positive|finite"),
        ({"length": 17}, "1 to 16"),
        ({"length": 0}, "1 to 16"),
    ],
)
@pytest.mark.parametrize("kind", ["vqgan_vq", "vae_continuous"])
def test_what_cannot_be_asked_for_is_refused(kind, options, message):
    tok = tiny(kind)
    with pytest.raises(TokensError, match=message):
        tok.encode(pictures(tok, 1), **options)


def test_samples_of_a_posterior_follow_the_seed_and_nothing_else():
    tok = tiny("vae_continuous", sample_posterior=True, latent_scale=1.0)
    images = pictures(tok)
    first, again, other = (tok.encode(images, seed=seed).extras["vectors"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(tok.encode(images[2], seed=1).extras["vectors"][0], first[2])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    tok = tiny(kind).to(torch.bfloat16)
    tokens = tok.encode(pictures(tok))
    assert all(value.dtype in (torch.float32, torch.bool) for value in tokens.extras.values())
    assert tok.decode(tokens)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 18},
        {"pixel_multipliers": (1, 1)},
        {"num_tokens": 33},
        {"num_tokens": 0},
        {"position_size": 3},
        {"pixel_dim": 24},
        {"decoder_heads": 5},
        {"levels": (0.1, 0.05)},
        {"levels": ()},
        {"levels": (0.0, 0.1)},
        {"pixel": "vae"},
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        KARLConfig.from_dict({**TINY, **changes})


# -- training


@pytest.mark.parametrize("training", ["pixels", "latents"])
@pytest.mark.parametrize("kind", ["vqgan_vq", "vae_continuous"])
def test_training_learns_and_reaches_every_weight(kind, training):
    torch.manual_seed(0)
    tok = KARL(KARLConfig(**{**TINY, **KINDS[kind], "training": training, "commitment": 1.0})).train()
    size = tok.config.image_size
    batch = torch.rand(4, 3, 1, 1).expand(4, 3, size, size).contiguous()
    frozen = ("pixel.",) if training == "latents" else ()
    unread = ("pixel.codebook", "encoder.level_embedding", "encoder.latent_tokens", "decoder.latent_positional_embedding")
    for name, parameter in tok.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    optimizer = torch.optim.Adam((p for p in tok.parameters() if p.requires_grad), lr=3e-3)
    history = []
    for step in range(15):
        output = tok(batch, progress=step / 15, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            trained = {name: p for name, p in tok.named_parameters() if p.requires_grad and name not in unread}
            assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        optimizer.step()
        history.append(float(output.loss.detach()))
    assert history[-1] < 0.9 * history[0]
    assert output.reconstruction.shape == batch.shape


def test_halting_learns_how_many_tokens_the_reached_error_took():
    """Asked for the error that n tokens reached, the first n shall be active and the rest halted."""
    tok = tiny().train()
    seen = []
    forward = tok.encoder.forward

    def watch(images, features, level, budget):
        latents = forward(images, features, level, budget)
        seen.append((level, latents.halting))
        return latents

    tok.encoder.forward = watch
    batch = pictures(tok, 2)
    output = tok(batch, generator=torch.Generator().manual_seed(3))
    (strict, first), (level, second) = seen
    budget = first.shape[1]
    assert bool((torch.tensor(tok.config.levels)[strict] <= 0.04).all())
    assert second.shape == (2, 16)
    expected = F.binary_cross_entropy_with_logits(first, torch.zeros_like(first))
    expected = expected + F.binary_cross_entropy_with_logits(second[:, :budget], torch.zeros_like(second[:, :budget]))
    if budget < 16:
        expected = expected + F.binary_cross_entropy_with_logits(second[:, budget:], torch.ones_like(second[:, budget:]))
    torch.testing.assert_close(output.losses["halting"], expected)
    assert len(level) == 2


def test_budgets_and_strictness_are_drawn_as_published():
    tok = tiny().train()
    budgets, levels = set(), []
    tok.encoder.forward = lambda images, features, level, budget, inner=tok.encoder.forward: (
        budgets.add(budget),
        levels.append(level),
        inner(images, features, level, budget),
    )[2]
    generator, batch = torch.Generator().manual_seed(0), pictures(tok, 1)
    with torch.no_grad():
        for _ in range(120):
            tok(batch, progress=1.0, generator=generator)
    assert budgets == set(range(1, 24))
    assert {int(level) for level in levels[::2]} == {0}


def test_extra_losses_count_for_both_passes():
    tok = tiny().train()
    tok.extra_losses["blue"] = lambda reconstruction, original: (reconstruction - original)[:, 2].square().mean((1, 2))
    output = tok(pictures(tok, 2), generator=torch.Generator().manual_seed(0))
    assert float(output.losses["blue"].detach()) > 0
    assert not [name for name in tok.state_dict() if "blue" in name]


def test_targets_may_be_of_any_type_of_real_number():
    tok = tiny()
    image = pictures(tok, 1)
    assert tok.encode(image, target={"l1": np.float32(0.25)}).equal(tok.encode(image, target={"l1": 0.25}))


@pytest.mark.parametrize("kind", ["vqgan_vq", "vae_vq"])
def test_training_on_latents_sends_nothing_into_its_own_targets(kind):
    tok = tiny(kind, training="latents")
    batch = pictures(tok, 2)
    tok(batch, generator=torch.Generator().manual_seed(0)).loss.backward()
    assert not [name for name, p in tok.pixel.named_parameters() if p.grad is not None]
    assert tok.decoder.head[0].weight.grad.any()
    with pytest.raises(ConfigError, match=r"pixel\.\*"):
        tok.train()(batch)
    tok.pixel.requires_grad_(False)
    tok(batch)

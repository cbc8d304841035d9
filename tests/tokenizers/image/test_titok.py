import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.tokenizers import ConfigError, Tokens, TokensError, WrongTokenizerError
from tokenzoo.tokenizers.image.tatitok import TATiTok, TATiTokConfig
from tokenzoo.tokenizers.image.titok import TiTok, TiTokConfig, config_from_published

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 4,
    "codebook_size": 32,
    "token_dim": 6,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 16), ("layers", 2), ("heads", 2))},
    "pixel_codebook_size": 8,
    "pixel_dim": 6,
    "pixel_channels": 32,
    "pixel_multipliers": (1, 1, 1),
    "pixel_blocks": 1,
}
KINDS = {
    "legacy": {},
    "vq": {"legacy": False, "metric": "l2"},
    "vae": {"legacy": False, "quantizer": "vae"},
}


def tiny(kind="vq", **changes):
    torch.manual_seed(0)
    return TiTok(TiTokConfig(**{**TINY, **KINDS[kind], **changes})).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- parity


@pytest.mark.parametrize("name", ["titok_legacy", "titok_vq"])
def test_ids_and_images_equal_the_references(golden, name):
    case = golden(name, TiTok)
    tokens = case.tok.encode(case.images)
    assert torch.equal(tokens.ids, case.expected["ids"])
    assert torch.equal(case.tok._encode(case.images / 255, length=None, seed=0).ids, case.expected["ids"])
    close(torch.stack(case.tok.decode(tokens)), case.expected["reconstruction"].clamp(0, 1))


def test_vectors_and_images_equal_the_references_vae(golden):
    case = golden("titok_vae", TiTok)
    tokens = case.tok.encode(case.images)
    assert tokens.ids.shape == (3, 0, 8)
    close(tokens.extras["vectors"], case.expected["mean"])
    close(torch.stack(case.tok.decode(tokens)), case.expected["reconstruction"].clamp(0, 1))
    close(case.tok(case.images / 255).metrics["kl"], case.expected["kl"][0])


def test_captions_guide_the_decoder_as_in_the_reference(golden):
    case = golden("tatitok", TATiTok)
    tokens = case.tok.encode(case.images)
    assert torch.equal(tokens.ids, case.expected["ids"])
    captioned = case.tok.with_text(tokens, case.expected["text"])
    close(torch.stack(case.tok.decode(captioned)), case.expected["reconstruction"].clamp(0, 1))
    with pytest.raises(TokensError, match="with_text"):
        case.tok.decode(tokens)
    with pytest.raises(TokensError, match=r"\(5, 24\)"):
        case.tok.with_text(tokens, case.expected["text"][:2])


@pytest.mark.parametrize(
    ("name", "cls"), [("titok_legacy", TiTok), ("titok_vq", TiTok), ("titok_vae", TiTok), ("tatitok", TATiTok)]
)
def test_weights_go_back_to_the_published_layout(golden, name, cls):
    case = golden(name, cls)
    back = cls.adapters["published"].to_published(case.tok.state_dict())
    dropped = {"quantize.embed_prob"} & case.published.keys()
    assert back.keys() == case.published.keys() - dropped
    assert all(torch.equal(back[key], case.published[key]) for key in back)


def test_a_published_key_that_nobody_knows_is_not_ignored(golden):
    case = golden("titok_vq", TiTok)
    ours = TiTok.adapters["published"].to_ours({**case.published, "encoder.register_tokens": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"encoder\.register_tokens"):
        case.tok.load_state_dict(ours)


# -- configs


def nested(**changes):
    model = {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": "base",
        "vit_dec_model_size": "large",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 64,
        **changes,
    }
    model = {key: value for key, value in model.items() if value is not None}
    return {"experiment": {"output_dir": "x"}, "model": {"vq_model": model}, "dataset": {"preprocessing": {"crop_size": 256}}}


def test_published_configs_get_the_references_defaults():
    legacy = TiTokConfig.from_dict(config_from_published(nested()))
    assert (legacy.legacy, legacy.quantizer, legacy.metric, legacy.num_tokens) == (True, "vq", "cosine", 64)
    assert (legacy.encoder_dim, legacy.encoder_layers, legacy.decoder_dim, legacy.decoder_layers) == (768, 12, 1024, 24)
    vae = nested(quantize_mode="vae", is_legacy=False, finetune_decoder=False, codebook_size=None, use_l2_norm=None)
    assert TiTokConfig.from_dict(TiTok.config_from_published(vae)).quantizer == "vae"
    text = nested(is_legacy=False, finetune_decoder=False, use_l2_norm=False, text_context_length=77, clustering_vq=False)
    assert TATiTokConfig.from_dict(config_from_published(text)).text_length == 77


@pytest.mark.parametrize(
    "changes",
    [
        {"vit_enc_model_size": "huge"},
        {"vit_dec_patch_size": 8},
        {"quantize_mode": "fsq"},
        {"finetune_decoder": False},
        {"num_latent_tokens": None},
        {"num_latent_tokens": "64"},
        {"rotation_trick": True},
    ],
)
def test_published_configs_that_are_something_else_are_refused(changes):
    with pytest.raises(ConfigError):
        TiTokConfig.from_dict(config_from_published(nested(**changes)))


@pytest.mark.parametrize("published", [{}, {"model": None}, {"model": {"vq_model": 3}}])
def test_published_configs_without_a_model_are_refused(published):
    with pytest.raises(ConfigError, match="TiTok"):
        config_from_published(published)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 250},
        {"encoder_heads": 3},
        {"decoder_dim": 0},
        {"num_tokens": 0},
        {"quantizer": "vae"},
        {"pixel_multipliers": (1, 2)},
        {"metric": "dot"},
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        TiTokConfig.from_dict({**TINY, **changes})


# -- encode and decode


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_a_list_get_what_they_get_alone(kind):
    tok = tiny(kind)
    images = [torch.rand(3, 16 + 5 * i, 40 - 7 * i) for i in range(3)]
    together = tok.encode(images)
    for i, image in enumerate(images):
        alone = tok.encode(image)
        assert torch.equal(alone.ids[0], together.ids[i])
        if kind == "vae":
            assert torch.equal(alone.extras["vectors"][0], together.extras["vectors"][i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_and_loaded_batch_decodes_alike(kind, tmp_path):
    tok = tiny(kind)
    tokens = tok.encode(torch.rand(2, 3, 30, 20))
    tokens.save(tmp_path / "tokens.tok")
    images = tok.decode(tokens)
    assert all(image.shape == (3, 20, 20) and image.min() >= 0 and image.max() <= 1 for image in images)
    for a, b in zip(images, tok.decode(Tokens.load(tmp_path / "tokens.tok")), strict=True):
        assert torch.equal(a, b)


def random_picture(rng):
    mode = rng.choice(["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16", "F", "YCbCr", "HSV"])
    height, width = (int(n) for n in rng.integers(1, 70, 2))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32))
    if mode == "LA":
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert("LA")
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def test_500_random_pictures_of_odd_sizes_and_modes():
    tok, rng = tiny("legacy"), np.random.default_rng(0)
    tokens = tok.encode([random_picture(rng) for _ in range(500)])
    tokens.validate()
    assert tokens.ids.shape == (500, 1, 4)
    some = tokens[:20]
    for image, meta in zip(tok.decode(some), some.meta, strict=True):
        assert list(image.shape[1:]) == meta["size"]
        assert image.isfinite().all()


def test_samples_of_a_posterior_follow_the_seed_and_nothing_else():
    tok = tiny("vae", sample_posterior=True)
    images = torch.rand(3, 3, 16, 16)
    first, again, other = (tok.encode(images, seed=seed).extras["vectors"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(tok.encode(images[2], seed=1).extras["vectors"][0], first[2])
    assert torch.equal(tok._encode(images, length=None, seed=1).extras["vectors"][1], first[1])
    mean = tiny("vae").encode(images, seed=1).extras["vectors"]
    assert not torch.equal(mean, first)


def test_fixed_lengths_stay_fixed():
    tok = tiny()
    tokens = tok.encode(torch.rand(3, 16, 16))
    assert tok.encode(torch.rand(3, 16, 16), length=4).lengths.tolist() == [[4]]
    with pytest.raises(TokensError, match="fixed length"):
        tok.encode(torch.rand(3, 16, 16), length=3)
    with pytest.raises(TokensError, match="truncated"):
        tokens.truncate(2)
    cut = dataclasses.replace(tokens, ids=tokens.ids[..., :2], lengths=tokens.lengths - 2)
    with pytest.raises(TokensError, match="all 4 tokens"):
        tok.decode(cut)


def test_vectors_of_another_shape_are_refused():
    tok = tiny("vae")
    tokens = tok.encode(torch.rand(3, 16, 16))
    for extras in ({}, {"vectors": tokens.extras["vectors"][:, :2]}):
        with pytest.raises(TokensError, match="vectors"):
            tok.decode(dataclasses.replace(tokens, extras=extras))


def test_tokens_of_other_weights_are_refused():
    tok, other = tiny(), TiTok(TiTokConfig(**{**TINY, **KINDS["vq"]})).eval()
    with pytest.raises(WrongTokenizerError):
        other.decode(tok.encode(torch.rand(3, 16, 16)))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    tok = tiny(kind).to(torch.bfloat16)
    tokens = tok.encode(torch.rand(2, 3, 16, 16))
    assert all(value.dtype == torch.float32 for value in tokens.extras.values())
    assert tok.decode(tokens)[0].dtype == torch.float32


# -- training


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_reaches_every_weight(kind):
    tok = tiny(kind, commitment=1.0).train()
    batch = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16).contiguous()
    optimizer = torch.optim.Adam(tok.parameters(), lr=3e-3)
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(40):
        output = tok(batch, progress=step / 40, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            untouched = [name for name, p in tok.named_parameters() if p.grad is None or not p.grad.any()]
            assert not untouched
        optimizer.step()
        history.append(float(output.losses["reconstruction"].detach()))
    assert history[-1] < 0.6 * history[0]
    assert output.reconstruction.shape == batch.shape


def test_training_with_captions():
    config = TATiTokConfig(**{**TINY, **KINDS["vq"], "text_length": 5, "text_dim": 8})
    tok, batch = TATiTok(config).train(), torch.rand(2, 3, 16, 16)
    tok.objective(batch, text=torch.randn(2, 5, 8)).loss.backward()
    assert tok.text_proj.weight.grad.any()
    with pytest.raises(TokensError, match="captions"):
        tok(batch)

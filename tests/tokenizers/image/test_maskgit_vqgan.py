from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.image.maskgit_vqgan import VQGAN, VQGANConfig
from tokenzoo.tokenizers.image.one_d_piece import OneDPiece, OneDPieceConfig
from tokenzoo.tokenizers.image.titok import TiTok, TiTokConfig

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = {"image_size": 16, "codebook_size": 16, "dim": 6, "channels": 32, "multipliers": (1, 1, 1), "blocks": 1}
STUDENT = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 6,
    "codebook_size": 32,
    "token_dim": 6,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 32), ("layers", 2), ("heads", 2))},
    "pixel_codebook_size": 16,
    "pixel_dim": 6,
    "pixel_channels": 32,
    "pixel_multipliers": (1, 1, 1),
    "pixel_blocks": 1,
}


def tiny(**changes):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(**{**TINY, **changes})).eval()


def colours(count, seed=0):
    """Flat pictures, `[count, 3, 16, 16]`."""
    return torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, -1, 16, 16).contiguous()


def fit(tok, batch, steps, lr=3e-3):
    """Losses of every step, after which they have been minimised."""
    tok.train()
    optimizer = torch.optim.Adam([p for p in tok.parameters() if p.requires_grad], lr=lr)
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(steps):
        output = tok(batch, progress=step / steps, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in output.losses.items()})
    tok.eval()
    return history


# -- the VQGAN


def test_ids_and_images_are_the_references():
    """The fixture of tests/encoders, by way of the tokenizer and its adapter."""
    expected = load_file(GOLDEN / "maskgit_vqgan.expected.safetensors")
    published = {key: tensor.float() for key, tensor in load_file(GOLDEN / "maskgit_vqgan.state.safetensors").items()}
    config = VQGANConfig(image_size=16, codebook_size=40, dim=12, channels=32, multipliers=(2, 1), blocks=1)
    tok, adapter = VQGAN(config).eval(), VQGAN.adapters["published"]
    tok.load_state_dict(adapter.to_ours(published))
    tokens = tok.encode(expected["images"])
    assert torch.equal(tokens.ids[:, 0], expected["ids"].flatten(1))
    decoded = torch.stack(tok.decode(tokens))
    torch.testing.assert_close(decoded, expected["reconstruction"].clamp(0, 1), rtol=0, atol=1e-4)
    assert adapter.to_published(tok.state_dict()).keys() == published.keys()


def test_the_grid_cannot_be_cut():
    tok = tiny()
    tokens = tok.encode([torch.rand(3, 16, 16), torch.rand(3, 40, 25)])
    assert tokens.ids.shape == (2, 1, 16)
    assert tokens.spec.grid == (4, 4)
    assert [image.shape for image in tok.decode(tokens)] == [(3, 16, 16), (3, 25, 25)]
    with pytest.raises(TokensError, match="fixed length"):
        tok.encode(torch.rand(3, 16, 16), length=3)
    with pytest.raises(TokensError, match="all 16 tokens"):
        tok._decode(tokens.ids[..., :3], tokens.lengths, {})


@pytest.mark.parametrize("changes", [{"image_size": 18}, {"channels": 20}, {"multipliers": ()}, {"dim": 0}])
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        VQGANConfig.from_dict({**TINY, **changes})


def test_training_learns():
    history = fit(tiny(kmeans_iterations=5, restart_after=5), colours(8), 40)
    assert history[-1]["reconstruction"] < 0.3 * history[0]["reconstruction"]


# -- TiTok's two stages


@pytest.fixture
def teacher():
    """A VQGAN with codes spread over what it sees, so that there is something to predict."""
    tok = tiny()
    tok.quantizer.codebook.data = tok.encoder(colours(16)).flatten(2).mT.detach()[:, 5]
    return tok


def student(cls=TiTok, config=TiTokConfig, **changes):
    torch.manual_seed(1)
    return cls(config(**{**STUDENT, **changes}))


@pytest.mark.parametrize(("cls", "config"), [(TiTok, TiTokConfig), (OneDPiece, OneDPieceConfig)])
def test_the_first_stage_learns_the_teachers_codes(teacher, cls, config):
    tok, batch = student(cls, config), colours(8)
    tok.learn_from(teacher)
    before = {name: tensor.clone() for name, tensor in tok.state_dict().items()}
    history = fit(tok, batch, 40)
    assert set(history[0]) == {"proxy", "quantizer"}
    assert history[-1]["proxy"] < 0.5 * history[0]["proxy"]
    kept = [name for name in before if name.startswith(("decoder.head.codebook", "decoder.head.pixel_decoder"))]
    assert all(torch.equal(tok.state_dict()[name], before[name]) for name in kept)
    output = tok(batch)
    assert output.reconstruction is None
    assert output.metrics["proxy_accuracy"] > 0.3


def test_the_teacher_follows_the_images(teacher):
    tok, batch = student(), colours(2)
    tok.learn_from(teacher)
    loss = tok(batch).losses["proxy"]
    torch.testing.assert_close(tok.double()(batch.double()).losses["proxy"].float(), loss, rtol=0, atol=1e-4)


def test_the_pixel_half_is_the_teachers(teacher):
    tok = student()
    tok.learn_from(teacher)
    wanted = teacher.codes(colours(2))
    with torch.no_grad():
        sure = 1e4 * torch.nn.functional.one_hot(wanted, 16).float()
        tok.decoder.head.layers = torch.nn.Identity()
        torch.testing.assert_close(tok.decoder.head(sure), teacher._paint(teacher.quantizer.lookup(wanted)))
    assert not any("proxy" in name or "teacher" in name for name in tok.state_dict())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_second_stage_keeps_the_ids_and_improves_the_pixels(teacher):
    tok, batch = student(), colours(8)
    tok.learn_from(teacher)
    fit(tok, batch, 20)
    tok.proxy_codes = None
    ids = tok.encode(batch).ids
    for name, parameter in tok.named_parameters():
        parameter.requires_grad_(not name.startswith(("encoder.", "quantizer.")))
    history = fit(tok, batch, 40)
    assert history[-1]["reconstruction"] < 0.5 * history[0]["reconstruction"]
    assert torch.equal(tok.encode(batch).ids, ids)


def test_teachers_that_do_not_fit_are_refused(teacher):
    with pytest.raises(ConfigError, match="codebook_size 16 for 8"):
        student(pixel_codebook_size=8).learn_from(teacher)
    with pytest.raises(ConfigError, match="legacy=True"):
        student(legacy=False).learn_from(teacher)
    with pytest.raises(ConfigError, match="maskgit_vqgan"):
        student().learn_from(student())

"""Parity with apple/ml-flextok@87d00cc on a small config with random weights, and what is different here."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenzoo.kernels import fsq_codes
from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.image._flow import Sampling, widened
from tokenzoo.tokenizers.image.flextok import (
    FlexTok,
    FlexTokConfig,
    config_from_published,
    flow_times,
    patchify,
    prefix_lengths,
    sines_and_cosines,
    unpatchify,
)

GOLDEN = Path(__file__).parents[2] / "golden"
LENGTHS = (1, 11, 63, 64)
TINY = {
    "image_size": 32,
    "vae_channels": (8, 8),
    "vae_blocks": 1,
    "vae_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
    "patch_size": 4,
    "num_tokens": 8,
    "levels": (4, 3),
    "encoder_dim": 16,
    "encoder_layers": 2,
    "decoder_dim": 24,
    "decoder_layers": 3,
    "head_dim": 8,
    "encoder_table": (4, 4),
    "decoder_table": (5, 5),
    "register_table": 8,
    "time_frequencies": 16,
    "steps": 2,
    "guidance": 2.0,
}
PIXELS = {**TINY, "decoder_dim": 64, "vae_channels": (), "latent_channels": 3, "patch_size": 8}


def tiny(**changes):
    """Random weights everywhere: a fresh FlexTok reads out zeros, whatever it sees."""
    torch.manual_seed(0)
    tok = FlexTok(FlexTokConfig(**{**TINY, **changes})).eval()
    for name, parameter in tok.named_parameters():
        if not name.startswith("vae."):
            torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() > 1 else 0.2)
    return tok


def freeze_autoencoder(tok):
    for name, parameter in tok.named_parameters():
        parameter.requires_grad_(not name.startswith("vae."))
    return tok


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def case(golden):
    return golden("flextok", FlexTok)


# -- parity


@torch.no_grad()
def test_ids_equal_the_references(case):
    assert torch.equal(case.tok.encode(case.images).ids, case.expected["ids"])
    assert torch.equal(case.tok._encode(case.images / 255, length=None, seed=0).ids, case.expected["ids"])
    close(case.tok.latents(case.images / 255), case.expected["latents"])


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_one_step_of_the_flow(case, length):
    codes = fsq_codes(case.expected["ids"][:, 0, :length], case.tok.config.levels)
    decoder = case.tok.decoder
    for guided in (False, True):
        plan = decoder.plan(length, guided=guided)
        velocity, _ = decoder(case.expected["noise"], torch.ones(1), decoder.registers(codes), plan)
        close(velocity[:2], case.expected[f"velocity_{length}"])


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sampling", [Sampling(3, 3.0, "cfg"), Sampling(3, lambda time: 30 * time, "apg")])
def test_guided_decoding(case, length, sampling):
    case.tok.sampling = sampling
    codes = fsq_codes(case.expected["ids"][:, 0, :length], case.tok.config.levels)
    close(case.tok.denoise(codes, case.expected["noise"]), case.expected[f"{sampling.method}_{length}"])


@torch.no_grad()
def test_prefixes_of_a_batch_may_differ(case):
    case.tok.sampling = Sampling(3, 3.0)
    for i, length in enumerate((5, 40)):
        codes = fsq_codes(case.expected["ids"][i : i + 1, 0, :length], case.tok.config.levels)
        close(case.tok.denoise(codes, case.expected["noise"][i : i + 1]), case.expected["mixed"][i : i + 1])


def test_images_from_seeded_noise(case):
    case.tok.sampling = Sampling(4, 7.5, seed=7)
    tokens = case.tok.encode(case.images, length=20)
    close(torch.stack(case.tok.decode(tokens)), case.expected["reconstruction_20"].clamp(0, 1))


def test_weights_go_back_to_the_published_layout(case):
    back = FlexTok.adapters["published"].to_published(case.tok.state_dict())
    assert back.keys() == case.published.keys()
    assert all(torch.equal(back[key], case.published[key]) for key in back)


def test_what_training_left_in_a_checkpoint(case):
    wrapped = {
        key.replace("_transformer.blocks.0.", "_transformer.blocks.0._checkpoint_wrapped_module."): v
        for key, v in case.published.items()
    }
    left = {
        "decoder.module_dict.dec_repa_head.mlp.1.weight": torch.ones(3),
        "vae.logvar": torch.ones(()),
        "vae.vae.encoder.mid_block.attentions.0.to_qkv.weight": torch.ones(3),
    }
    ours = FlexTok.adapters["published"].to_ours({**wrapped, **left})
    assert ours.keys() == case.tok.state_dict().keys()
    case.tok.load_state_dict(ours, strict=True)
    with pytest.raises(RuntimeError, match="enc_new"):
        case.tok.load_state_dict(
            FlexTok.adapters["published"].to_ours({**wrapped, "encoder.module_dict.enc_new.x": left["vae.logvar"]})
        )


# -- the published config


@pytest.fixture
def published():
    return json.loads((GOLDEN / "flextok_config.json").read_text())


def vae_of(**changes):
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
        **changes,
    }


def test_every_value_is_read_from_the_published_config(published, case):
    values = config_from_published(published)
    config = FlexTokConfig.from_dict(
        {**values, "image_size": 64, "vae_channels": (8, 16, 16), "vae_blocks": 1, "vae_groups": 8}
    )
    assert config == case.tok.config
    assert (config.decoder_dim, config.max_time, config.scaling_factor) == (48, 1.0, 0.7)
    assert (config.prefix_sampling, config.null_probability) == ("pow2", 0.2)
    assert (config.time_sampling, config.mode_scale) == ("mode", 0.25)


def test_the_references_defaults_are_taken_where_the_config_says_nothing(published):
    for module, key in [
        ("enc_transformer", "head_dim"),
        ("dec_transformer", "head_dim"),
        ("dec_time_embedder", "max_timestep"),
    ]:
        del published["encoder" if module.startswith("enc") else "decoder"]["module_dict"][module][key]
    values = config_from_published(published)
    assert (values["head_dim"], values["max_time"], values["mlp_ratio"]) == (64, 1000.0, 4.0)
    assert values["vae_channels"] == (128, 256, 512, 512)


def test_an_autoencoder_may_be_described_in_another_repository(published):
    published["vae"] |= {"hf_hub_path": "org/vae", "scaling_factor": None}
    asked = []
    values = config_from_published(published, lambda repo: asked.append(repo) or vae_of(scaling_factor=0.3))
    assert asked == ["org/vae"]
    assert (values["vae_channels"], values["vae_blocks"], values["vae_groups"], values["scaling_factor"]) == (
        (8, 16),
        1,
        4,
        0.3,
    )
    published["vae"]["scaling_factor"] = 0.9
    assert config_from_published(published, lambda _: vae_of(scaling_factor=0.3))["scaling_factor"] == 0.9
    for related in (None, lambda _: vae_of(act_fn="relu"), lambda _: vae_of(_class_name="VQModel"), lambda _: vae_of(new=1)):
        with pytest.raises(ConfigError, match="published config of a FlexTok"):
            config_from_published(published, related)


CHANGES = [
    (("vae", "_target_"), "os.system", "nothing was imported"),
    (("decoder", "module_dict", "dec_transformer", "_target_"), "evil.FlexTransformer", "nothing was imported"),
    (("encoder", "module_dict", "enc_channels_to_last", "per_sample_op", "_target_"), "builtins.eval", "nothing was imported"),
    (("vae", "scaling_factor"), None, "scaling_factor"),
    (("encoder", "module_dict", "enc_transformer", "qk_norm"), False, "another graph"),
    (("encoder", "module_dict", "enc_transformer", "rope_forward_read_key"), "rope", "another graph"),
    (("encoder", "module_dict", "enc_seq_packer", "mask_mode"), "full", "another graph"),
    (("encoder", "module_dict", "enc_transformer", "new_flag"), 1, "unknown arguments: new_flag"),
    (("decoder", "module_dict", "dec_latent_dropout", "replace_with_single_token"), True, "another graph"),
    (("decoder", "module_dict", "dec_to_patches", "use_mup_readout"), True, "another graph"),
    (("decoder", "module_dict", "dec_transformer", "head_dim"), 8, "one head_dim"),
    (("decoder", "module_dict", "dec_noise_patch_emb", "patch_sizes"), [4, 4], "patches of one size"),
    (("decoder", "module_dict", "dec_noise_patch_emb", "patch_sizes"), [2, 4], "two equal sizes"),
    (("decoder", "module_dict", "dec_registers_posemb_module", "posemb_type"), "sincos", "learned"),
    (("decoder", "module_dict", "dec_new"), {}, "modules of the decoder"),
    (("new",), {}, "unknown arguments: new"),
    (("pipeline", "out_channels"), 3, "another graph"),
    (("regularizer", "levels"), None, "lacks 'levels'"),
    (("regularizer",), 3, "to be an object"),
    (("regularizer", "levels"), 5, "published config of a FlexTok"),
    (("encoder", "module_dict", "enc_patch_emb", "patch_sizes"), 2, "published config of a FlexTok"),
    (("decoder", "module_dict", "dec_registers_posemb_module", "max_sizes"), 256, "published config of a FlexTok"),
    (("decoder", "module_dict", "dec_registers_posemb_module", "max_sizes"), [], "published config of a FlexTok"),
    (("vae", "scaling_factor"), [1], "published config of a FlexTok"),
    (("vae", "hf_hub_path"), "org/vae", "its config.json is needed"),
]


@pytest.mark.parametrize(("path", "value", "message"), CHANGES)
def test_configs_of_another_network_are_refused(published, path, value, message):
    node = copy.deepcopy(published)
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        config_from_published(node)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 31},
        {"image_size": 2},
        {"patch_size": 3},
        {"patch_size": 0},
        {"head_dim": 7},
        {"num_tokens": 16},
        {"num_tokens": 6},
        {"levels": (1, 4)},
        {"levels": ()},
        {"decoder_table": (3, 4)},
        {"decoder_table": (4,)},
        {"decoder_positions": "learnable_sum", "decoder_table": (4, 5)},
        {"encoder_positions": "rope"},
        {"vae_channels": ()},
        {"null_probability": 1.0},
        {"alignment_network": "x", "alignment_layer": 3},
        {"guidance_method": "none"},
        {"steps": 0},
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        FlexTokConfig.from_dict({**TINY, **changes})


# -- encode and decode


@pytest.mark.parametrize(
    "changes", [{}, {"vae_channels": (), "latent_channels": 3, "patch_size": 8}, {"sample_posterior": True}]
)
def test_items_of_a_list_get_what_they_get_alone(changes):
    tok = tiny(**changes)
    images = [torch.rand(3, 16 + 5 * i, 40 - 7 * i) for i in range(3)]
    together = tok.encode(images, length=[1, 8, 3])
    decoded = tok.decode(together)
    for i, image in enumerate(images):
        assert torch.equal(tok.encode(image).ids[0, :, : [1, 8, 3][i]], together[i].ids[0])
        assert torch.equal(tok.decode(together[i])[0], decoded[i])
        assert list(decoded[i].shape[1:]) == [min(image.shape[1:])] * 2
    assert together.bits.tolist() == pytest.approx([n * math.log2(12) for n in (1, 8, 3)])


def test_a_true_batch_decodes_as_its_items_do():
    tok = tiny()
    ids = torch.randint(12, (3, 1, 5), generator=torch.Generator().manual_seed(0))
    lengths, seeds = torch.full((3, 1), 5), torch.tensor([3, 1, 3])
    with torch.no_grad():
        together = tok._decode(ids, lengths, {"seed": seeds})
        for i in range(3):
            close(together[i : i + 1], tok._decode(ids[i : i + 1], lengths[:1], {"seed": seeds[i : i + 1]}))


def test_every_item_has_its_own_seed(tmp_path):
    tok = tiny()
    tokens = tok.encode(torch.rand(1, 3, 32, 32).expand(3, -1, -1, -1))
    same = tok.decode(tokens)
    assert torch.equal(same[0], same[1])
    seeded = tok.with_seed(tokens, [4, 5, 4])
    seeded.save(tmp_path / "tokens.tok")
    images = tok.decode(Tokens.load(tmp_path / "tokens.tok"))
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(tok.decode(seeded[1])[0], images[1])
    tok.sampling = dataclasses.replace(tok.sampling, seed=5)
    assert torch.equal(tok.decode(tokens)[0], images[1])
    assert torch.equal(tok.decode(tok.with_seed(tokens, 4))[1], images[0])
    assert tok.with_seed(tokens, np.array([4, 5, 4])).extras["seed"].tolist() == [4, 5, 4]
    assert tok.with_seed(tokens, [np.int32(1), torch.tensor(2), -(2**63)]).extras["seed"].tolist() == [1, 2, -(2**63)]
    for seeds in ([1, 2], [1, 2, "3"], 0.5, "123", True, [1, True, 2], 2**63, np.array([0.5, 1, 2]), np.array([True] * 3)):
        with pytest.raises(TokensError, match="3 items"):
            tok.with_seed(tokens, seeds)
    for extra in (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(TokensError, match=r"extras\['seed'\], int64"):
            tok.decode(dataclasses.replace(tokens, extras={"seed": extra}))


def test_steps_and_guidance_are_the_users():
    tok = tiny()
    tokens = tok.encode(torch.rand(3, 32, 32))
    samplings = [Sampling(1), Sampling(3), Sampling(3, 1.0), Sampling(3, 5.0, "cfg"), Sampling(3, lambda t: 1 + t)]
    images = []
    for tok.sampling in samplings:
        images.append(tok.decode(tokens)[0])
        assert torch.equal(tok.decode(tokens)[0], images[-1])
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert Sampling(guidance=np.float32(2)).strength(0.5) == 2
    wrongs = [{"steps": 0}, {"steps": 2.5}, {"steps": True}, {"method": "pag"}, {"seed": 1.5}, {"seed": True}, {"seed": 2**63}]
    for wrong in (*wrongs, *({"guidance": value} for value in ("7", True, math.nan, math.inf, None))):
        with pytest.raises(ConfigError):
            Sampling(**wrong)


def test_positions_that_hold_one_vector_count_as_often_as_they_stand_for(monkeypatch):
    """Against the plain sequence, in which every register that is missing has its own place."""
    tok = tiny()
    decoder, length = tok.decoder, 3
    codes = torch.randn(2, length, 2)
    noised, time = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        short = decoder.registers(codes)
        missing = decoder.mask_token.expand(2, tok.config.num_tokens - length, -1)
        unknown = decoder.null_token.expand(2, tok.config.num_tokens, -1)
        whole = decoder.plan(tok.config.num_tokens, guided=False)
        plain = [decoder(noised, time, registers, whole)[0] for registers in (torch.cat([short, missing], 1), unknown)]
        close(decoder(noised, time, short, decoder.plan(length, guided=True))[0], torch.cat(plain))
        close(decoder(noised, time, short, decoder.plan(length, guided=False))[0], plain[0])
        assert (plain[0] - plain[1]).abs().max() > 0.05


def test_a_register_does_not_see_the_next_ones():
    tok = tiny()
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        before = tok.encoder(latents)
        tok.encoder.registers[5] *= -1
        after = tok.encoder(latents)
    close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3


def test_target_finds_the_length_by_bisection(monkeypatch):
    tok = tiny(**PIXELS)
    white = torch.ones(2, 3, 32, 32)

    def brightening(codes, noise):
        level = 2 * codes.shape[1] / tok.config.num_tokens - 1
        return torch.full_like(noise, level * tok.config.scaling_factor)

    monkeypatch.setattr(tok, "denoise", brightening)
    for wanted in (0.7, 0.5, 0.3, 0.0):
        tokens = tok.encode(white, target={"l1": wanted + 1e-6})
        shortest = next(n for n in range(1, 9) if 1 - n / 8 <= wanted + 1e-6)
        assert tokens.lengths.flatten().tolist() == [shortest, shortest]
        assert tokens.meta[0]["target"]["met"]


def test_target_with_a_seeded_flow_is_reproducible():
    tok = tiny()
    images = torch.rand(3, 3, 32, 32)
    full = tok.qualities["psnr"].measure(torch.stack(tok.decode(tok.encode(images))), images)
    tokens = tok.encode(images, target={"psnr": float(full.min()) - 0.05})
    assert tokens.equal(tok.encode(images, target={"psnr": float(full.min()) - 0.05}))
    reached = tok.qualities["psnr"].measure(torch.stack(tok.decode(tokens)), images)
    for i, meta in enumerate(tokens.meta):
        assert meta["target"]["psnr"] == pytest.approx(float(reached[i]), abs=1e-4)
        assert tok.encode(images[i], target={"psnr": float(full.min()) - 0.05}).lengths[0] == tokens.lengths[i]


def test_bfloat16():
    tok = tiny().to(torch.bfloat16)
    tokens = tok.encode(torch.rand(2, 3, 32, 32), length=3)
    image = tok.decode(tokens)[0]
    assert image.dtype == torch.float32
    assert image.isfinite().all()


@pytest.mark.parametrize("kind", ["learnable_sum", "learnable_prod"])
def test_learned_positions(kind):
    tok = tiny(decoder_positions=kind)
    rows, columns = tok.decoder.positions.table[:, 0].detach()
    cells = tok.decoder.positions().detach().view(4, 4, -1)
    expected = rows[:, 2] + columns[:, 3] if kind == "learnable_sum" else rows[:, 2] * columns[:, 3]
    close(cells[2, 3], expected)


def test_patches_and_positions():
    x = torch.randn(2, 3, 8, 8)
    patches = patchify(x, 4)
    assert torch.equal(patches[1, 2, :3], x[1, :, 4, 0])
    assert torch.equal(unpatchify(patches, 2, 4), x)
    table = sines_and_cosines(8, 3, 5)
    assert table.shape == (1, 8, 3, 5)
    close(table[0, :, 2, 4], torch.tensor([f(n * w) for n in (2, 4) for f in (math.sin, math.cos) for w in (1, 0.01)]))


# -- training


@pytest.mark.parametrize("changes", [{}, {**PIXELS, "patch_size": 4, "encoder_table": (8, 8), "decoder_table": (8, 8)}])
def test_training_learns_and_reaches_every_weight(changes):
    torch.manual_seed(0)
    tok = freeze_autoencoder(FlexTok(FlexTokConfig(**{**TINY, "decoder_dim": 64, **changes})).train())
    batch = torch.rand(8, 3, 1, 1).expand(8, 3, 32, 32).contiguous()
    optimizer = torch.optim.Adam([p for n, p in tok.named_parameters() if not n.startswith("vae.")], lr=3e-3)
    generator, history, touched = torch.Generator().manual_seed(0), [], set()
    for step in range(60):
        output = tok(batch, progress=step / 60, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        touched |= {name for name, p in tok.named_parameters() if p.grad is not None and p.grad.any()}
        history.append(float(output.losses["flow"].detach()))
    assert sum(history[-10:]) < 0.75 * sum(history[:10])
    assert touched == {name for name, _ in tok.named_parameters() if not name.startswith("vae.")}


def test_training_draws_from_the_generator_alone():
    tok, batch = freeze_autoencoder(tiny().train()), torch.rand(4, 3, 32, 32)
    losses = [float(tok(batch, generator=torch.Generator().manual_seed(seed)).loss.detach()) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    lengths = tok.eval()(batch, generator=torch.Generator().manual_seed(1))
    assert lengths.reconstruction is None


def test_prefix_lengths_in_training():
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    assert set(prefix_lengths("pow2", 8, u).tolist()) == {1, 2, 4, 8}
    assert set(prefix_lengths("uniform", 6, u).tolist()) == {1, 2, 3, 4, 5, 6}
    rounded = prefix_lengths("uniform_pow2", 8, u)
    assert rounded.bincount(minlength=9).tolist() == pytest.approx([0, 500, 500, 0, 1000, 0, 0, 0, 2000], abs=120)
    assert prefix_lengths("pow2", 8, torch.tensor([0.0, 0.9999999])).tolist() == [1, 8]


@pytest.mark.parametrize("sampling", ["mode", "logit_normal"])
def test_times_in_training(sampling):
    times = flow_times(sampling, 0.25, torch.linspace(0, 1, 2001))
    assert times.isfinite().all()
    assert 0 <= times.min() <= times.max() <= 1
    middle = float(((times > 0.25) & (times < 0.75)).float().mean())
    assert middle == pytest.approx({"mode": 0.5, "logit_normal": 0.728}[sampling], abs=0.08)


def test_alignment_with_the_features_of_another_network():
    tok = freeze_autoencoder(tiny(alignment_network="vit", alignment_dim=5, alignment_layer=2).train())
    seen = []

    def features(images):
        seen.append(images.shape)
        return torch.randn(len(images), 16, 5, generator=torch.Generator().manual_seed(0))

    tok.features = features
    output = tok(torch.rand(2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    assert seen == [(2, 3, 32, 32)]
    assert 0 < float(output.losses["alignment"].detach()) < 2
    output.losses["alignment"].backward()
    assert all(p.grad.any() for p in tok.alignment.parameters())
    assert tok.decoder.blocks[2].mlp.up.weight.grad.any()
    assert tok.decoder.out.weight.grad is None
    tok.features = lambda images: torch.zeros(len(images), 9, 5)
    with pytest.raises(ConfigError, match=r"expected features \(2, 16, 5\)"):
        tok(torch.rand(2, 3, 32, 32))


def test_training_demands_a_frozen_autoencoder():
    tok = tiny().train()
    batch = torch.rand(2, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"vae\.\*"):
        tok(batch)
    freeze_autoencoder(tok)(batch).loss.backward()
    assert tok.eval()(batch).loss.isfinite()


def test_devices_without_float64_get_float32():
    for kind, dtype in (("cpu", torch.float64), ("mps", torch.float32)):

        class Elsewhere(torch.Tensor):
            device = torch.device(kind)

        assert widened(torch.ones(2).as_subclass(Elsewhere)).dtype == dtype

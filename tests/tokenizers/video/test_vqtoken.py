from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenzoo.tokenizers import ConfigError, DownloadError, TokensError
from tokenzoo.tokenizers.video.vqtoken import PUBLISHED, VQToken, VQTokenConfig, elbow, tokdense

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "vqtoken.safetensors")


def tiny(**values):
    torch.manual_seed(0)
    options = {"tower": "test_vit", "tower_layers": 0, "image_size": 80, "dim": 16, "frames": 4, "clusters": 10, "heads": 4}
    return VQToken(VQTokenConfig(**{**options, "feedforward": 32, **values})).eval()


def clip(frames=4, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (frames, 5, 6, 3), dtype=np.uint8)
    return small.repeat(12, 1).repeat(12, 2)


def test_clusters_index_map_and_attention_are_those_of_the_specification():
    tok = tiny(fewest_clusters=4, iterations=100)
    tok.attention.load_state_dict({k.removeprefix("attention."): v for k, v in GOLDEN.items() if k.startswith("attention.")})
    ids, codebook = tok.group(GOLDEN["features"])
    assert torch.equal(ids, GOLDEN["ids"])
    torch.testing.assert_close(codebook, GOLDEN["codebook"], rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(tok.tokens_of(ids, codebook), GOLDEN["tokens"], rtol=0, atol=1e-4)


def test_a_clip_becomes_ids_a_codebook_and_tokens_and_decodes_to_features():
    tok = tiny()
    tokens = tok.encode([clip(9), clip(2, 1), clip(4, 2)])
    assert tokens.lengths[:, 0].tolist() == [100, 50, 100]
    assert tokens.extras["codebook"].shape == tokens.extras["tokens"].shape == (3, 10, 16)
    assert [m["frames"] for m in tokens.meta] == [4, 2, 4]
    assert tok.info.decodes_to == "features"
    for i, features in enumerate(tok.decode(tokens)):
        count = int(tokens.lengths[i, 0])
        expected = tokens.extras["codebook"][i][tokens.ids[i, 0, :count]]
        assert torch.equal(features, expected.reshape(-1, 5, 5, 16))
        alone = tok.encode(clip((9, 2, 4)[i], i))
        assert torch.equal(alone.ids[0], tokens.ids[i, :, :count])
        assert torch.equal(alone.extras["tokens"][0], tokens.extras["tokens"][i])
    assert tokens.unpack(tokens.pack()).equal(tokens)


def test_attention_is_computed_in_double_precision():
    """Ids as numbers make large queries, so that single precision is not enough at full size."""
    tok = tiny(image_size=16 * 27, dim=64, clusters=32)
    ids, codebook = torch.randint(32, (4, 729)), torch.nn.functional.normalize(torch.randn(32, 64), dim=-1)
    with torch.no_grad():
        tokens, single = tok.tokens_of(ids, codebook), tok.attention(ids, codebook)
        exact = tok.attention.double()(ids, codebook.double())
    assert torch.equal(tokens, exact.float())
    assert not torch.equal(single, tokens)


def test_length_is_the_number_of_clusters():
    tok = tiny(clusters=10)
    tokens = tok.encode([clip(4), clip(2, 1)], length=[6, 3])
    assert tokens.extras["clusters"].tolist() == [6, 3]
    assert [int(ids.max()) for ids in tokens.ids[:, 0]] == [5, 2]
    assert not tokens.extras["tokens"][1, 3:].any()
    for length in (0, 11):
        with pytest.raises(TokensError, match="1 to 10 tokens"):
            tok.encode(clip(), length=length)
    with pytest.raises(TokensError, match="4 frames and 3 clusters"):
        tok.encode(clip(), length=3)


def test_the_seed_decides_and_the_number_of_threads_does_not():
    tok = tiny()
    features = torch.randn(4, 729, 64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(tok.group(features, seed=3))
    finally:
        torch.set_num_threads(threads)
    for ids, codebook in found[1:]:
        assert torch.equal(ids, found[0][0])
        assert torch.equal(codebook, found[0][1])
    assert not torch.equal(tok.group(features, seed=4)[0], found[0][0])


def test_a_clip_gets_the_same_tokens_on_any_number_of_threads():
    tok, threads = tiny(), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(tok.encode([clip(4), clip(3, 1)]))
    finally:
        torch.set_num_threads(threads)
    assert found[1].equal(found[0])
    assert found[2].equal(found[0])


def test_adaptive_number_of_clusters_follows_the_clip():
    tok = tiny(tokens="centroid", fewest_clusters=2, frames=2)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    few = directions[torch.arange(50) % 3].reshape(2, 25, 16)
    assert len(tok.group(few)[1]) <= 4
    assert len(tok.group(directions[torch.arange(50) % 9].reshape(2, 25, 16))[1]) > 4
    assert torch.equal(tok.encode(clip(2)).extras["tokens"], tok.encode(clip(2)).extras["codebook"])


def test_elbow():
    assert elbow(torch.tensor([10.0, 4.0, 3.0, 2.0, 1.0])) == 1
    assert elbow(torch.tensor([5.0])) == 0
    assert elbow(torch.tensor([3.0, 3.0, 3.0])) == 0


def test_tokdense_is_the_papers():
    assert tokdense(57.72, 13.08) == pytest.approx(4.413, abs=1e-3)
    assert tokdense(57.46, 32) == pytest.approx(1.796, abs=1e-3)


def test_too_many_frames_and_missing_codebooks_are_refused():
    with pytest.raises(ConfigError, match="as many frames as clusters"):
        VQTokenConfig.from_dict({"frames": 33})
    tok = tiny()
    with pytest.raises(TokensError, match="5 frames and 3 clusters"):
        tok.tokens_of(torch.zeros(5, 25, dtype=torch.long), torch.zeros(3, 16))
    tokens = tok.encode(clip())
    with pytest.raises(TokensError, match="own codebook"):
        tok.decode(type(tokens)(tokens.ids, tokens.lengths, tokens.spec))


def test_published_names_there_and_back():
    state = tiny().state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("tower.") or k.split(".")[1] in ("patch_embed", "blocks")}
    published = PUBLISHED.to_published(state)
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in published
    assert published["model.cross_attention.transformer_decoder.layers.0.self_attn.in_proj_weight"].shape == (48, 16)
    published["lm_head.weight"] = published["model.layers.0.mlp.up_proj.weight"] = torch.zeros(1)
    ours = PUBLISHED.to_ours(published)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[k], state[k]) for k in state)


def test_any_vision_transformer_of_timms_is_a_tower():
    tok = VQToken.over("test_vit", pretrained=False, frames=4, clusters=6)
    assert tok.config.image_size == tok.tower.pretrained_cfg["input_size"][-1]
    assert (tok.config.projector, tok.config.tokens) == ("none", "centroid")
    tokens = tok.encode(clip(3))
    size = tok.config.image_size // 16
    assert tok.decode(tokens)[0].shape == (3, size, size, tok.tower.num_features)
    frames = torch.rand(2, 3, tok.config.image_size, tok.config.image_size)
    mean, deviation = (torch.tensor(tok.tower.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        seen = tok.tower.forward_features((frames - mean) / deviation)[:, tok.tower.num_prefix_tokens :]
        torch.testing.assert_close(tok.features(frames), seen)
    for name in ("resnet18", "no_such_network"):
        with pytest.raises(ConfigError, match="tower: expected a"):
            VQToken.over(name, pretrained=False)
        with pytest.raises(ConfigError, match="tower: expected a"):
            tiny(tower=name)
    with pytest.raises(ConfigError, match="of 64, the tower's width"):
        tiny(projector="none", dim=32)


def test_weights_of_a_tower_that_cannot_be_had_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="test_vit could not be had from the Hub"):
        VQToken.over("test_vit")


def test_the_published_towers_activation_is_not_timms():
    tok = tiny(tower_activation="gelu_tanh")
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(tok.tower.blocks[0].mlp.act(x), torch.nn.functional.gelu(x, approximate="tanh"))
    assert not torch.equal(tiny(tower_activation="").tower.blocks[0].mlp.act(x), tok.tower.blocks[0].mlp.act(x))
    assert VQTokenConfig().tower_activation == "gelu_tanh"


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_a_whitening_is_fitted_to_what_the_tower_sees(kind):
    tok = tiny(projector="whitening", dim=12)
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(4, 3, 3, 5, 5, generator=generator).repeat_interleave(16, 3).repeat_interleave(16, 4)
    clips = (clips * 255).to(torch.uint8)
    tok.initialise(clips if kind == torch.uint8 else clips.float() / 255, generator)
    with torch.no_grad():
        rows = torch.cat([tok.features(item.float() / 255) for item in clips]).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(12), rtol=0, atol=1e-2)


def test_features_train_through_the_codebook():
    tok = tiny()
    features = torch.randn(4, 25, 16, requires_grad=True)
    ids, codebook = tok.group(features)
    frozen = tok.group(features.detach())
    assert torch.equal(ids, frozen[0])
    torch.testing.assert_close(codebook, frozen[1])
    codebook.square().sum().backward()
    assert bool(features.grad.flatten(0, 1).any(1).all())


def test_training_moves_the_attention_and_nothing_else():
    tok = tiny().train()
    batch = torch.stack([tok.media.read(clip(seed=s))[0] for s in range(2)])
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in tok.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(40):
        output = tok(batch, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = tok.state_dict()
    assert {k for k in before if not torch.equal(after[k], before[k])} == {k for k in before if k.startswith("attention.")}


def test_training_draws_as_many_clusters_as_there_are_frames_or_more():
    tok = tiny(fewest_clusters=4).train()
    seen = []
    hook = tok.attention.register_forward_hook(lambda module, inputs, output: seen.append([len(x) for x in inputs]))
    for seed in range(12):
        tok(torch.rand(1, 8, 3, 40, 40), generator=torch.Generator().manual_seed(seed))
    hook.remove()
    assert {frames for frames, _ in seen} == {8}
    assert {clusters for _, clusters in seen} == {8, 9, 10}


@pytest.mark.parametrize("shape", [(3, 4, 3, 80, 80), (12, 3, 80, 80)])
def test_masked_autoencoding_trains_the_tower_on_clips_and_on_pictures(shape):
    tok = tiny(hidden=0.75, tokens="centroid").train()
    coarse = torch.rand(12, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    batch = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3).reshape(shape)
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in tok.parameters() if p.requires_grad], 1e-3)
    losses = []
    for step in range(60):
        output = tok(batch, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["hidden_patches"].item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    changed = {k for k, v in tok.state_dict().items() if not torch.equal(v, before[k])}
    assert {"tower.blocks.0.attn.qkv.weight", "tower.patch_embed.proj.weight", "autoencoder.missing"} <= changed
    assert not any(k.startswith(("projector", "newline")) for k in changed)
    assert tok.eval().encode(clip()).ids.shape == (1, 1, 100)

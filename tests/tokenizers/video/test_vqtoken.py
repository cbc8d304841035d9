from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenzoo.tokenizers import ConfigError, TokensError
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


def test_training_moves_the_attention_and_nothing_else():
    tok = tiny().train()
    batch = torch.stack([tok.media.read(clip(seed=s))[0] for s in range(2)])
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in tok.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(15):
        output = tok(batch, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = tok.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("tower."))
    assert not torch.equal(after["attention.to_q_proj.weight"], before["attention.to_q_proj.weight"])

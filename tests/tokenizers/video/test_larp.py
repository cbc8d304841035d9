import numpy as np
import pytest
import torch

from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.video.larp import LARP, DrawingQuantizer, LARPConfig, waves

TINY = {
    "image_size": 16,
    "num_frames": 4,
    "patch_size": 4,
    "frame_stride": 2,
    "num_tokens": 6,
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "codebook_size": 32,
    "token_dim": 4,
}


def tiny(**changes):
    torch.manual_seed(0)
    tok = LARP(LARPConfig(**{**TINY, **changes})).eval()
    tok.quantizer.codebook.data.normal_()
    tok.encoder.queries.data.mul_(20)
    return tok


def clip(frames, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- parity


def test_pixels_before_they_are_clamped_equal_the_references(golden):
    case = golden("larp", LARP)
    item = next(item for item in case.cases if len(item.clip) == 4)
    close(case.tok.decoder(case.tok.quantizer.lookup(item.ids[None]))[0], item.reconstruction)


def test_ids_of_the_reference_depend_on_the_clip(golden):
    first = torch.stack([item.ids[:12] for item in golden("larp", LARP).cases])
    assert len(first.unique()) > 12
    assert len(first.unique(dim=0)) == len(first)


def test_weights_go_back_to_the_published_layout(golden):
    case = golden("larp", LARP)
    back = case.adapter.to_published(case.tok.state_dict())
    assert back.keys() == case.published.keys()
    assert all(torch.equal(back[key], case.published[key]) for key in back)


def test_the_prior_is_dropped_and_nothing_else(golden):
    case = golden("larp", LARP)
    with_prior = {**case.published, "prior_model.head.weight": torch.zeros(1)}
    assert case.adapter.to_ours(with_prior).keys() == case.tok.state_dict().keys()
    with pytest.raises(RuntimeError, match="register"):
        case.tok.load_state_dict(case.adapter.to_ours({**case.published, "register": torch.zeros(1)}))


def test_positions_are_those_that_are_published(golden):
    case = golden("larp", LARP)
    fresh = LARP(case.tok.config).state_dict()
    for name in ("encoder.positions", "decoder.positions", "decoder.queries"):
        torch.testing.assert_close(fresh[name], case.tok.state_dict()[name], rtol=0, atol=1e-3)  # stored in float16


# -- clips of any length and size


@pytest.mark.parametrize("frames", [1, 4, 5, 9])
def test_a_window_has_a_fixed_number_of_tokens(frames):
    tokens = tiny().encode(clip(frames))
    assert tokens.lengths.tolist() == [[6 * -(-frames // 4)]]
    assert tokens.spec.grid is None


def test_the_last_frame_fills_its_window():
    tok = tiny()
    frames = clip(3)
    assert torch.equal(tok.encode(frames).ids, tok.encode(frames[[0, 1, 2, 2]]).ids)
    assert not torch.equal(tok.encode(frames).ids, tok.encode(frames[[2, 1, 0, 0]]).ids)


# -- tokens


def test_part_of_a_window_is_refused():
    tok = tiny()
    with pytest.raises(TokensError, match="all 6 tokens"):
        tok.decode(Tokens(torch.zeros(1, 1, 8).long(), torch.tensor([[8]]), tok.info))


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 18},
        {"num_frames": 5},
        {"heads": 3},
        {"dim": 6},
        {"temperature": -1.0},
        {"num_tokens": 0},
        {"unknown": 1},
    ],
)
def test_configs_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        LARPConfig.from_dict({**TINY, **changes})


def test_waves_of_place_zero_and_of_the_shortest_length():
    found = waves(torch.arange(3), 8)
    close(found[0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))
    close(found[:, 0], torch.arange(3).sin())


# -- training


def test_the_objective_trains_every_part():
    tok = tiny().train()
    output = tok(torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    output.loss.backward()
    assert output.losses.keys() == {"pixels", "quantizer"}
    assert [name for name, p in tok.named_parameters() if p.grad is None] == []
    assert output.reconstruction.shape == (2, 4, 3, 16, 16)


def test_training_draws_codes_by_their_cosines():
    quantizer = DrawingQuantizer(4, 2, 2, commitment=0.25, temperature=0.5).train()
    quantizer.in_proj.weight.data.copy_(torch.eye(2))
    quantizer.in_proj.bias.data.zero_()
    quantizer.codebook.data.copy_(torch.tensor([[1.0, 0], [0, 2], [-1, 0], [0, -1]]))
    x = torch.tensor([3.0, 0]).expand(20_000, 2)
    ids = quantizer(x, torch.Generator().manual_seed(0)).ids
    expected = (torch.tensor([1.0, 0, -1, 0]) / 0.5).softmax(0)
    torch.testing.assert_close(torch.bincount(ids, minlength=4) / len(ids), expected, rtol=0, atol=0.01)
    assert torch.equal(ids, quantizer(x, torch.Generator().manual_seed(0)).ids)
    assert bool((quantizer.eval()(x).ids == 0).all())

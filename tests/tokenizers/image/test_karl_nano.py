import pytest
import torch

from tokenzoo.evaluation.asked_errors import spearman
from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.image.karl_nano import KARLNano, KARLNanoConfig, image_details
from tokenzoo.tokenizers.quality import l1

TINY = {
    "image_size": 16,
    "num_tokens": 24,
    "codebook_size": 64,
    "num_classes": 8,
    "code_dim": 4,
    "luma_radius": 12,
    "chroma_radius": 6,
    "width": 16,
    "heads": 2,
    "condition_dim": 16,
    "halting_dim": 16,
    "classes_tried": 2,
}


def crops(count, seed=0):
    """Pictures of very different detail, uint8."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=16, mode="bicubic")
    noise = torch.rand(count, 3, 16, 16, generator=generator)
    share = torch.rand(count, 1, 1, 1, generator=generator) ** 2
    return ((1 - share) * smooth + share * noise).clamp(0, 1).mul(255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def tok():
    """A fitted code whose halting was trained for a moment; the refiner is still the identity."""
    torch.manual_seed(0)
    tok = KARLNano(KARLNanoConfig(**TINY))
    tok.initialise(crops(400), torch.Generator().manual_seed(0))
    for name, parameter in tok.named_parameters():
        parameter.requires_grad_(name.startswith("halting"))
    optimizer = torch.optim.Adam(tok.halting.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    tok.losses = []
    for step in range(60):
        output = tok.train()(crops(32, seed=step).float() / 255, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        tok.losses.append(float(output.losses["halting"].detach()))
    return tok.eval()


def test_training_learns_halting(tok):
    assert sum(tok.losses[-15:]) < 0.9 * sum(tok.losses[:15])


def test_an_asked_error_is_answered_in_one_pass_and_held(tok, monkeypatch):
    images = crops(64, seed=1000).float() / 255
    asked = {error: tok.encode(images, target={"l1": error}) for error in (0.05, 0.08, 0.12)}
    for error, tokens in asked.items():
        errors = l1(torch.stack(tok.decode(tokens, native=True)), images)
        reachable = l1(torch.stack(tok.decode(tok.encode(images, length=24), native=True)), images) <= error
        assert float((errors[reachable] <= 1.3 * error).float().mean()) > 0.9
    means = [tokens.lengths.float().mean() for tokens in asked.values()]
    assert means[0] > means[1] > means[2]
    monkeypatch.setattr(tok, "reconstruct", lambda *args: pytest.fail("something was decoded"))
    again = tok.encode(images, target={"l1": 0.08})
    assert again.equal(asked[0.08])
    assert again.meta[0]["target"] == {"asked": 0.08}


def test_lengths_follow_the_detail_of_the_image(tok):
    images = crops(64, seed=2000).float() / 255
    lengths = tok.encode(images, target={"l1": 0.1}).lengths[:, 0]
    detail = images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3))
    assert spearman(lengths.tolist(), detail.tolist()) > 0.6


def test_fewer_tokens_are_a_prefix_and_other_targets_bisect(tok):
    images = crops(3, seed=3000).float() / 255
    whole, some = tok.encode(images, length=24), tok.encode(images, target={"l1": 0.07})
    assert whole.lengths.flatten().tolist() == [24] * 3
    for i in range(3):
        count = int(some.lengths[i])
        assert torch.equal(some[i].ids, whole[i].truncate(count).ids)
    by_bisection = tok.encode(images, target={"psnr": 18})
    assert all(set(meta["target"]) == {"met", "psnr"} for meta in by_bisection.meta)
    default = tok.encode(images)
    assert torch.equal(default.lengths, tok.encode(images, target={"l1": 0.05}).lengths)


def test_items_of_a_list_get_what_they_get_alone(tok):
    images = [torch.rand(3, 16 + 3 * i, 40 - 5 * i) for i in range(3)]
    together = tok.encode(images, target={"l1": 0.1})
    for i, image in enumerate(images):
        assert tok.encode(image, target={"l1": 0.1}).equal(together[i])
    batch = crops(5, seed=7).float() / 255
    ids, lengths = tok.encode_at(batch, 0.08)
    for i in range(5):
        alone = tok.encode(batch[i], target={"l1": 0.08})
        assert lengths[i].tolist() == alone.lengths[0].tolist()
        assert torch.equal(ids[i, :, : int(lengths[i])], alone.ids[0])


@pytest.mark.parametrize("error", [0, -1, "low", float("nan"), float("inf"), True])
def test_errors_that_cannot_be_asked_for_are_refused(tok, error):
    with pytest.raises(TokensError, match=r"positive mean absolute error|finite"):
        tok.encode(torch.rand(3, 16, 16), target={"l1": error})


def test_details_see_scales():
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    halves = (torch.arange(16)[None] < 8).expand(16, 16)
    details = image_details(torch.stack([checkerboard, halves]).float()[:, None].expand(-1, 3, -1, -1))
    assert details.shape == (2, 6)
    torch.testing.assert_close(details[0].exp(), torch.full((6,), 0.5001))
    torch.testing.assert_close(details[1].exp(), torch.full((6,), 0.0001))


def test_half_precision_weights_choose_nearly_the_same_lengths(tok):
    half = KARLNano(KARLNanoConfig(**TINY)).eval()
    half.load_state_dict(tok.state_dict())
    half = half.to(torch.bfloat16)
    images = crops(8, seed=4000).float() / 255
    counts = [other.encode(images, target={"l1": 0.06}).lengths.float() for other in (tok, half)]
    assert float((counts[0] - counts[1]).abs().mean()) < 3


def test_configs_that_cannot_be_built_are_refused():
    with pytest.raises(ConfigError):
        KARLNanoConfig.from_dict({**TINY, "classes_tried": 9})

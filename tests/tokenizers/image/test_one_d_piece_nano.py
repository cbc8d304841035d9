import pytest
import torch

from tokenzoo.tokenizers.errors import ConfigError
from tokenzoo.tokenizers.image.one_d_piece_nano import (
    OneDPieceNano,
    OneDPieceNanoConfig,
    cosine_matrix,
    spectrum_layout,
)
from tokenzoo.tokenizers.quality import psnr

CONFIG = OneDPieceNanoConfig(
    image_size=16,
    num_tokens=8,
    codebook_size=64,
    code_dim=4,
    num_classes=4,
    luma_radius=10,
    chroma_radius=6,
    width=8,
    blocks=1,
    heads=2,
    condition_dim=8,
)


def pictures(count, seed):
    """Smooth random pictures, float32 `[count, 3, 16, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tok = OneDPieceNano(CONFIG)
    crops = (pictures(600, 1) * 255).byte()
    tok.initialise(crops, torch.Generator().manual_seed(0))
    return tok.eval()


def randomise_refiner(tokenizer):
    generator = torch.Generator().manual_seed(3)
    for parameter in tokenizer.refiner.parameters():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_transform_is_orthonormal_and_invertible_on_kept_coefficients(tokenizer):
    matrix = cosine_matrix(16)
    assert torch.allclose(matrix @ matrix.T, torch.eye(16), atol=1e-6)
    coefficients = torch.randn(3, len(tokenizer.kept))
    images = tokenizer.synthesise(coefficients)
    assert torch.allclose(tokenizer.analyse(images), coefficients, atol=1e-5)
    assert torch.allclose((images - 0.5).square().sum((1, 2, 3)), coefficients.square().sum(1), rtol=1e-4)


def test_bands_cover_the_kept_coefficients():
    kept, bands = spectrum_layout(CONFIG)
    assert len(kept) == len(bands) == len(kept.unique())
    assert bands.min() == 0
    assert len(bands.unique()) == bands.max() + 1


def test_initialised_it_beats_the_mean_and_more_tokens_are_better(tokenizer):
    images = pictures(64, 2)
    tokens = tokenizer.encode(list(images))
    quality = []
    for length in (1, 2, 4, 8):
        decoded = torch.stack(tokenizer.decode(tokens.truncate(length)))
        quality.append(float(psnr(decoded, images).mean()))
    flat = images.mean((0, 2, 3), keepdim=True).expand_as(images)
    assert quality[0] > float(psnr(flat, images).mean())
    assert quality == sorted(quality)


def test_ids_of_a_prefix_are_a_prefix_of_the_ids(tokenizer):
    images = list(pictures(5, 4))
    whole, short = tokenizer.encode(images), tokenizer.encode(images, length=3)
    assert torch.equal(whole.truncate(3).ids, short.ids)
    assert torch.equal(tokenizer.encode(images[2]).ids, whole[2:3].ids)


def test_mixed_lengths_decode_as_each_would_alone():
    torch.manual_seed(0)
    tokenizer = OneDPieceNano(CONFIG).eval()
    randomise_refiner(tokenizer)
    ids = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1, 3, 8, 5])
    together = tokenizer.reconstruct(ids, lengths)
    for item, length in enumerate(lengths.tolist()):
        alone = tokenizer.reconstruct(ids[item : item + 1, :length], lengths[item : item + 1])
        assert torch.allclose(alone[0], together[item], atol=1e-5)


def test_decoding_in_steps_gives_what_encoding_subtracted(tokenizer):
    images = pictures(6, 5)
    coefficients = tokenizer.analyse(images)
    ids = tokenizer.code.encode(coefficients, 8)
    previous = torch.full((6,), float("inf"))
    for length in range(1, 9):
        decoded = tokenizer.code.decode(ids, torch.full((6,), length))
        error = (decoded - coefficients).square().sum(1)
        assert error.mean() < previous.mean()
        previous = error


def test_objective_trains_refiner_and_tables():
    torch.manual_seed(0)
    tokenizer = OneDPieceNano(CONFIG)
    tokenizer.initialise((pictures(300, 1) * 255).byte(), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(tokenizer.parameters(), 2e-3)
    batch, losses = pictures(32, 6), []
    for _ in range(12):
        output = tokenizer(batch, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert output.reconstruction.shape == batch.shape
    assert tokenizer.code.codebook.grad.abs().sum() > 0


def test_training_lengths_cover_the_range_and_follow_the_generator(tokenizer):
    lengths = tokenizer._training_lengths(3000, torch.Generator().manual_seed(0))
    assert lengths.min() == 1
    assert lengths.max() == 8
    assert 0.25 < (lengths == 8).float().mean() < 0.55
    assert torch.equal(lengths, tokenizer._training_lengths(3000, torch.Generator().manual_seed(0)))


def test_too_few_crops_are_refused():
    with pytest.raises(ValueError, match="at least 64 crops"):
        OneDPieceNano(CONFIG).initialise(torch.zeros(10, 3, 16, 16, dtype=torch.uint8), torch.Generator())


@pytest.mark.parametrize("values", [{"num_classes": 5}, {"image_size": 20}, {"luma_radius": 80}])
def test_sizes_that_do_not_fit_are_refused(values):
    with pytest.raises(ConfigError):
        OneDPieceNanoConfig.from_dict(values)

"""How much of a clip clusters keep, and the release of a tiny VQToken from films of moving gradients."""

import numpy as np
import pytest
import torch

from tokenzoo import media
from tokenzoo.card import parse_card
from tokenzoo.evaluation.clusters import SIZES, closeness, evenly_spread, found_again, kept, neighbours, release
from tokenzoo.tokenizers.video.vqtoken import VQToken, VQTokenConfig
from tokenzoo.training.clips import ClipStore
from tokenzoo.training.loop import train
from tokenzoo.training.recipe import ClipsRecipe, Recipe

pytest.importorskip("av")
CONFIG = {"tower": "test_vit", "tower_layers": 0, "tower_activation": "", "image_size": 64, "projector": "whitening"}
CONFIG |= {"dim": 12, "heads": 2, "feedforward": 16}
CARD = """---
license: apache-2.0
tokenzoo:
  architecture: vqtoken
  modality: video
  config: {config}
  source:
    file: nano/{name}.safetensors
    sha256: null
  size_mb: 0
  params: 0
---
before
<!-- measured -->
<!-- /measured -->
after
"""


def test_centroids_of_themselves_explain_everything_and_the_mean_nothing():
    units = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert closeness(3 * units, units) == pytest.approx((1, 1), abs=1e-5)
    assert closeness(units, units.mean(0).expand(50, -1))[1] == pytest.approx(0, abs=1e-5)


def test_patches_that_are_kept_stand_for_those_most_like_them():
    features = torch.tensor([[2.0, 0], [1, 0.1], [0, 1], [0.1, 3]])
    chosen = evenly_spread(features, 2)
    assert torch.equal(chosen[:2], torch.tensor([[1.0, 0], [1, 0]]))
    assert torch.equal(chosen[2], chosen[3])
    assert torch.equal(evenly_spread(features, 4), torch.nn.functional.normalize(features, dim=-1))


def test_more_clusters_keep_more_and_more_than_patches_do():
    tok = VQToken(VQTokenConfig(**CONFIG, frames=12)).eval()
    clips = [torch.randn(12, 16, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        rows = [kept(tok, clips, size) for size in (4, *SIZES)]
    assert [row.tokens for row in rows] == [4, *SIZES]
    explained = [row.explained for row in rows]
    assert explained == sorted(explained)
    assert all(row.explained > row.sampled_explained for row in rows)
    assert rows[0].readout is None
    assert all(-1 <= row.readout <= 1 for row in rows[1:])


@pytest.fixture
def films(tmp_path):
    """Four films, each a gradient of its own colours that moves."""
    (tmp_path / "films").mkdir()
    random = np.random.default_rng(0)
    for name in "abcd":
        coarse = torch.from_numpy(random.random((1, 3, 3, 5), dtype=np.float32))
        wide = torch.nn.functional.interpolate(coarse, (64, 160), mode="bicubic").clamp(0, 1)[0]
        clip = torch.stack([wide[:, :, at : at + 96] for at in range(32)])
        media.write(clip, tmp_path / "films" / f"{name}.mp4", "video", fps=10)
    return tmp_path / "films"


def test_a_film_finds_itself_by_its_colours(films, tmp_path):
    names = sorted(path.name for path in films.iterdir())
    store = ClipStore.build(films, names, tmp_path / "store", smallest=64, largest=64, most_frames=32)
    assert [a.shape for a, _ in neighbours(store)] == [(6, 3, 64, 64)] * 4
    assert found_again(store, lambda clip: clip.mean((0, 2, 3))[None] - 0.5) == 1
    assert found_again(store, lambda clip: torch.ones(1, 3)) < 1


def test_release_bundles_the_weights_and_refreshes_all_their_cards(films, tmp_path):
    data = ClipsRecipe(folder=str(films), held_out=0.5, frames=12, crop_size=64, smallest=64, largest=64, eval_clips=2)
    config = {**CONFIG, "frames": 12, "fewest_clusters": 12}
    run, cards = tmp_path / "run", tmp_path / "cards"
    options = {"steps": 2, "batch_size": 1, "initialise_items": 2, "save_every": 1, "freeze": ("projector.*", "newline")}
    recipe = Recipe(architecture="vqtoken", config=config, data=data, output=str(run), **options)
    train(recipe)
    cards.mkdir()
    for name in ("nano.a", "nano.b"):
        (cards / f"{name}.md").write_text(CARD.format(config={**CONFIG, "frames": 12}, name="nano.a"))
    found = release(run, recipe, cards / "nano.a.md", [cards / "nano.b.md"])
    assert found["step"] == 2
    assert list(found["kept"]) == ["12", "16", "32", "12 to 32"]
    texts = {name: (cards / f"{name}.md").read_text() for name in ("nano.a", "nano.b")}
    sources = {parse_card(name, text).source.sha256 for name, text in texts.items()}
    assert len(sources) == 1
    assert None not in sources
    assert "| 32 | 0." in texts["nano.a"]
    assert "a tower with random weights" in texts["nano.a"]
    assert (cards / "nano" / "nano.a.safetensors").exists()
    assert [path.name for path in (cards / "nano").iterdir()] == ["nano.a.safetensors"]

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from tokenzoo import load
from tokenzoo.tokenizers.errors import ConfigError, MediaError
from tokenzoo.training import Recipe, train
from tokenzoo.training.clips import ClipCropSampler, ClipStore, find_clips, split_files
from tokenzoo.training.recipe import AdversaryRecipe, ClipsRecipe
from tokenzoo.training.sources import prepare

av = pytest.importorskip("av")

TINY = {"width": 4, "blocks": 1, "first_classes": 4, "still_classes": 4, "moving_classes": 2, "motions": 4, "reach": 2}
ADVERSARY = AdversaryRecipe(width=4)


def film(seed, frames=12, height=32, width=48):
    """Smooth colours that drift by a pixel a frame, uint8 `(T, H, W, 3)`."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, 3, 6, 10)))
    scene = torch.nn.functional.interpolate(coarse, size=(height, width + frames), mode="bicubic").clamp(0, 1)[0]
    clip = torch.stack([scene[:, :, i : i + width] for i in range(frames)])
    return (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()


def write(path, frames):
    """Without loss, so that what is stored can be compared; AVI, which is read without a process of its own."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="bgr0")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder of films, one shorter than a crop; and what is none."""
    folder = tmp_path_factory.mktemp("films")
    for index in range(6):
        (folder / "deep").mkdir(exist_ok=True)
        write(folder / ("deep" if index % 2 else ".") / f"{index}.avi", film(index, frames=4 if index == 5 else 12))
    (folder / "notes.txt").write_text("not a film")
    (folder / "again.avi").symlink_to(folder / "0.avi")
    return folder


@pytest.fixture
def recipe(films, tmp_path):
    """Four steps of a tiny tokenizer."""
    data = ClipsRecipe(folder=str(films), held_out=0.4, frames=5, crop_size=16, smallest=16, largest=32, eval_clips=2)
    return Recipe(
        architecture="vidtok_nano",
        config=TINY,
        data=data,
        output=str(tmp_path / "run"),
        steps=4,
        batch_size=2,
        learning_rate=2e-3,
        warmup_steps=1,
        initialise_items=40,
        log_every=2,
        eval_every=4,
    )


def test_the_store_holds_every_frame_at_every_size(films, tmp_path):
    names = find_clips(films, ["*"])
    assert names == ["0.avi", "2.avi", "4.avi", "deep/1.avi", "deep/3.avi", "deep/5.avi"]
    assert find_clips(films, ["deep/*"], ["*/3.avi"]) == ["deep/1.avi", "deep/5.avi"]
    store = ClipStore.build(films, names, tmp_path, smallest=16, largest=32, most_frames=10)
    sides = [(level.frames, level.height, level.width) for level in store.levels if level.file == 0]
    assert sides == [(10, 16, 24), (10, 23, 34), (10, 32, 48)]
    largest = store.levels[2]
    assert np.array_equal(store.clip(largest), film(0)[:10])
    half = film(0)[3].reshape(16, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(store.clip(store.levels[0])[3] - half).mean() < 3
    written = (tmp_path / "pixels.u8").stat().st_mtime_ns
    again = ClipStore.build(films, names, tmp_path, smallest=16, largest=32, most_frames=10)
    assert again.levels == store.levels
    assert (tmp_path / "pixels.u8").stat().st_mtime_ns == written
    shorter = ClipStore.build(films, names, tmp_path, smallest=16, largest=32, most_frames=3)
    assert {level.frames for level in shorter.levels} == {3}


def test_crops_are_windows_in_space_and_time(films, tmp_path):
    store = ClipStore.build(films, find_clips(films, ["*"]), tmp_path, smallest=32, largest=32, most_frames=99)
    sampler = ClipCropSampler(store, range(6), frames=6, size=16, seed=3)
    crops = sampler.crops(7, 5)
    assert crops.shape == (5, 6, 16, 16, 3)
    assert np.array_equal(crops, sampler.crops(7, 5))
    assert not np.array_equal(crops, sampler.crops(8, 5))
    whole = [store.clip(level) for level in store.levels if level.frames >= 6]
    for crop in crops:
        found = any(
            np.array_equal(candidate[t : t + 6, y : y + 16, x : x + 16], crop)
            for clip in whole
            for candidate in (clip, clip[:, :, ::-1])
            for t in range(len(clip) - 5)
            for y in range(17)
            for x in range(33)
            if np.array_equal(candidate[t, y, x], crop[0, 0, 0])
        )
        assert found
    batch = sampler.batch(7, 5)
    assert batch.shape == (5, 6, 3, 16, 16)
    assert torch.equal((batch * 255).byte().permute(0, 1, 3, 4, 2), torch.from_numpy(crops))
    with pytest.raises(ValueError, match="no video of 6 has 13 frames of 16 pixels"):
        ClipCropSampler(store, range(6), frames=13, size=16, seed=0)


def test_files_are_held_out_by_their_last_name(films, tmp_path):
    store = ClipStore.build(films, find_clips(films, ["*"]), tmp_path, smallest=32, largest=32, most_frames=4)
    training, held_out = split_files(store, 0.4)
    assert sorted(training + held_out) == list(range(6))
    assert training
    assert held_out
    store.names = [f"elsewhere/{name.rsplit('/', 1)[-1]}" for name in store.names]
    assert split_files(store, 0.4) == (training, held_out)


def test_held_out_crops_may_have_a_size_of_their_own(recipe, tmp_path):
    larger = replace(recipe, data=replace(recipe.data, eval_size=24, eval_frames=9))
    source = prepare(larger, tmp_path)
    assert source.held_out.shape == (2, 9, 24, 24, 3)
    assert source.batch(0, 3).shape == (3, 5, 3, 16, 16)
    assert source.initial(4).dtype == torch.uint8


@pytest.mark.parametrize("adversary", [AdversaryRecipe(), ADVERSARY], ids=["pixels", "adversarial"])
def test_stopped_and_resumed_equals_never_stopped(recipe, tmp_path, adversary, checkpoint, same):
    recipe = replace(recipe, adversary=adversary)
    train(recipe)
    parts = replace(recipe, output=str(tmp_path / "parts"))
    train(replace(parts, steps=3))
    train(parts, resume=True)
    assert same(vars(checkpoint(recipe)), vars(checkpoint(parts)))


def test_the_loss_falls_and_the_result_loads(recipe, log):
    folder = train(replace(recipe, steps=60, log_every=20, eval_every=60))
    lines = log(recipe)
    assert lines[2]["log_error"] < lines[0]["log_error"]
    assert lines[3]["held_out_psnr"] > 15
    tokenizer = load(str(folder))
    (clip,) = tokenizer.decode(tokenizer.encode(film(9)))
    assert clip.shape == (12, 3, 32, 48)


def test_discriminators_of_clips_learn_along(recipe, log):
    train(replace(recipe, steps=30, log_every=15, adversary=replace(ADVERSARY, learning_rate=3e-3)))
    lines = [line for line in log(recipe) if "loss" in line]
    assert {"discriminator", "adversarial", "features", "log_error"} <= lines[0].keys()
    assert lines[1]["discriminator"] < lines[0]["discriminator"]


def test_published_architectures_train_on_clips_too(recipe, log):
    config = {"channels": 8, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "levels": [8, 8, 8]}
    train(replace(recipe, architecture="vidtok", config=config, adversary=ADVERSARY, steps=2))
    (line, *_) = [line for line in log(recipe) if "loss" in line]
    assert {"pixels", "adversarial"} <= line.keys()


def test_recipes_of_clips(tmp_path):
    read = Recipe.read("vidtok_nano")
    assert isinstance(read.data, ClipsRecipe)
    assert Recipe.from_dict(read.to_dict()) == read
    with pytest.raises(ConfigError, match="recordings or clips beside an adversary"):
        Recipe(architecture="one_d_piece_nano", adversary=ADVERSARY)
    with pytest.raises(ConfigError, match="found no video files"):
        prepare(replace(read, data=replace(read.data, folder=str(tmp_path))), tmp_path)


def test_what_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(MediaError, match=r"broken\.mp4.*leave it out with data\.exclude"):
        ClipStore.build(tmp_path, ["broken.mp4"], tmp_path / "store", smallest=16, largest=32, most_frames=9)
    write(tmp_path / "small.avi", film(0, height=8))
    with pytest.raises(MediaError, match="none of 1 files has a short side of 16 pixels"):
        ClipStore.build(tmp_path, ["small.avi"], tmp_path / "store", smallest=16, largest=32, most_frames=9)

import numpy as np
import pytest
from PIL import Image

from tokenzoo.training.data import (
    CropSampler,
    PhotoStore,
    detail,
    find_photos,
    fingerprint,
    group_copies,
    is_held_out,
    level_sides,
    open_photo,
    split_pictures,
)


def build(photos, folder):
    return PhotoStore.build(photos, find_photos(photos, ["*"]), folder, smallest=16, largest=64)


def test_globs_choose_photos_and_links_are_skipped(photos, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.PNG")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "z.jpg").symlink_to(tmp_path / "a" / "x.jpg")
    assert find_photos(tmp_path, ["*"]) == ["a/x.jpg", "y.PNG"]
    assert find_photos(tmp_path, ["*"], ["a/*"]) == ["y.PNG"]


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert open_photo(tmp_path / "x.png", 4).getpixel((0, 0)) == (255, 255, 255)


def test_copies_of_a_picture_share_a_fingerprint(photos):
    image = Image.open(photos / "03.png")
    others = [fingerprint(Image.open(photos / f"{i:02}.png")) for i in range(3)]
    copies = [fingerprint(image), fingerprint(image.resize((300, 200))), fingerprint(image.crop((16, 0, 80, 64)))]
    assert group_copies([*others, *copies]) == [0, 1, 2, 3, 3, 3]


def test_levels_are_half_octaves_up_to_the_photo():
    assert level_sides(130, 64, 256) == [64, 91, 128]
    assert level_sides(50, 64, 256) == []


def test_held_out_share_is_about_right_and_depends_on_the_name_alone():
    held = [is_held_out(f"photo {i}", 0.1) for i in range(2000)]
    assert 150 < sum(held) < 250
    assert held == [is_held_out(f"photo {i}", 0.1) for i in range(2000)]


def test_no_picture_is_on_both_sides_of_the_split(photos, tmp_path):
    store = build(photos, tmp_path)
    training, held_out = split_pictures(store, 0.3)
    assert held_out
    assert sorted(training + held_out) == list(range(len(store.names)))
    never = split_pictures(store, 0.3, [store.names[held_out[0]]])[1]
    assert never == held_out[1:]


def test_store_is_built_once_and_again_when_the_photos_change(photos, tmp_path):
    before = build(photos, tmp_path)
    written = (tmp_path / "pixels.u8").stat().st_mtime_ns
    assert build(photos, tmp_path).key == before.key
    assert (tmp_path / "pixels.u8").stat().st_mtime_ns == written
    fewer = PhotoStore.build(photos, before.names[:2], tmp_path, smallest=16, largest=64)
    assert fewer.names == before.names[:2]


def test_crops_are_a_function_of_seed_and_step(photos, tmp_path):
    store = build(photos, tmp_path)
    sampler, again, other = (CropSampler(store, [0, 1, 2], size=16, seed=seed) for seed in (5, 5, 6))
    crops = sampler.crops(3, 8)
    assert crops.shape == (8, 16, 16, 3)
    assert crops.dtype == np.uint8
    again.crops(2, 8)
    assert np.array_equal(crops, again.crops(3, 8))
    assert not np.array_equal(crops, sampler.crops(4, 8))
    assert not np.array_equal(crops, other.crops(3, 8))
    batch = sampler.batch(3, 8)
    assert batch.shape == (8, 3, 16, 16)
    assert np.array_equal((batch.permute(0, 2, 3, 1) * 255).round().numpy(), crops)


def test_more_candidates_give_more_detail(photos, tmp_path):
    store = build(photos, tmp_path)
    plain, picky = (CropSampler(store, range(9), size=16, seed=0, candidates=n).crops(0, 64) for n in (1, 4))
    assert np.mean([detail(crop) for crop in picky]) > np.mean([detail(crop) for crop in plain])


def test_photos_that_are_all_too_small_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="side of 65 pixels"):
        CropSampler(build(photos, tmp_path), [0, 1], size=65, seed=0)

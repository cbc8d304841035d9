import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from tokenzoo import load
from tokenzoo.tokenizers.errors import ConfigError, MediaError
from tokenzoo.training import Recipe, train
from tokenzoo.training.recipe import AdversaryRecipe, RecordingsRecipe
from tokenzoo.training.recordings import ClipSampler, RecordingStore, find_recordings, split_recordings

TINY = {
    "hop": 64,
    "mel_bands": 16,
    "pitch_candidates": 24,
    "dim": 4,
    "codebook_size": 16,
    "width": 16,
    "hidden": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "restart_after": 2,
}
ADVERSARY = AdversaryRecipe(width=4, periods=(2, 3), windows=(64,))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder of steady notes with vibrato, one of them shorter than a clip, one at another sample rate and in stereo."""
    folder = tmp_path_factory.mktemp("recordings")
    for index in range(8):
        rate, seconds = (8000 if index == 3 else 16000), (0.03 if index == 5 else 0.4)
        time = np.arange(int(rate * seconds)) / rate
        phase = 2 * np.pi * (110 + 20 * index) * time + 0.5 * np.sin(2 * np.pi * 5 * time)
        note = sum(np.sin(k * phase) / k for k in range(1, 8)) * 0.1
        (folder / f"voice{index % 2}").mkdir(exist_ok=True)
        soundfile.write(folder / f"voice{index % 2}" / f"{index}.wav", np.stack([note, note], 1) if index == 3 else note, rate)
    return folder


@pytest.fixture
def recipe(recordings, tmp_path):
    """Four steps of a tiny tokenizer."""
    return Recipe(
        architecture="wavtokenizer_nano",
        config=TINY,
        data=RecordingsRecipe(folder=str(recordings), held_out=0.3, clip_samples=1280, eval_clips=3),
        output=str(tmp_path / "run"),
        steps=4,
        batch_size=3,
        learning_rate=2e-3,
        warmup_steps=1,
        initialise_items=12,
        log_every=2,
        eval_every=4,
    )


@pytest.mark.parametrize("adversary", [AdversaryRecipe(), ADVERSARY], ids=["spectral", "adversarial"])
def test_stopped_and_resumed_equals_never_stopped(recipe, tmp_path, adversary, checkpoint, same):
    recipe = replace(recipe, adversary=adversary)
    train(recipe)
    parts = replace(recipe, output=str(tmp_path / "parts"))
    train(replace(parts, steps=3))
    train(parts, resume=True)
    assert same(vars(checkpoint(recipe)), vars(checkpoint(parts)))


def test_the_distance_falls_and_the_result_loads(recipe, log):
    folder = train(replace(recipe, steps=60, log_every=20, eval_every=60))
    lines = log(recipe)
    assert lines[2]["mel"] < lines[0]["mel"]
    assert lines[2]["pitch"] < lines[0]["pitch"]
    assert lines[3]["held_out_mel"] > 0
    tokenizer = load(str(folder))
    assert tokenizer.decode(tokenizer.encode(torch.zeros(1000)))[0].shape == (1, 1000)


def test_discriminators_learn_and_change_what_the_tokenizer_learns(recipe, tmp_path, log, checkpoint, same):
    train(replace(recipe, steps=40, log_every=20, eval_every=40, adversary=ADVERSARY))
    lines = log(recipe)
    assert {"discriminator", "adversarial", "features"} <= lines[0].keys()
    assert lines[1]["discriminator"] < lines[0]["discriminator"]
    plain = replace(recipe, steps=40, output=str(tmp_path / "plain"))
    train(plain)
    assert not same(checkpoint(recipe).model, checkpoint(plain).model)


def test_an_adversary_needs_audio(recipe):
    with pytest.raises(ConfigError, match="recordings"):
        Recipe(architecture="one_d_piece_nano", adversary=ADVERSARY)
    with pytest.raises(ConfigError, match="one of photos, recordings"):
        Recipe.from_dict({"start": "x", "data": {"media": "smells"}})
    read = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert read.to_dict() == recipe.to_dict()
    assert isinstance(read.data, RecordingsRecipe)


def build(recordings, tmp_path):
    return RecordingStore.build(recordings, find_recordings(recordings, ["*"]), tmp_path / "store", sample_rate=16000)


def test_the_store_holds_every_recording_once(recordings, tmp_path, monkeypatch):
    store = build(recordings, tmp_path)
    assert store.names == sorted(f"voice{i % 2}/{i}.wav" for i in range(8))
    original, _ = soundfile.read(recordings / store.names[0], dtype="float32")
    assert np.allclose(store.recording(0).numpy(), original, atol=1e-4)
    assert len(store.recording(store.names.index("voice1/3.wav"))) == 6400  # resampled from 8 kHz
    monkeypatch.setattr("tokenzoo.training.recordings.Audio", None)  # nothing is decoded twice
    assert build(recordings, tmp_path).offsets == store.offsets


def test_a_damaged_recording_is_named(recordings, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFFxxxx")
    with pytest.raises(MediaError, match=r"bad\.wav.*data\.exclude"):
        RecordingStore.build(tmp_path, ["bad.wav"], tmp_path / "store", sample_rate=16000)


def test_clips_are_a_function_of_the_step(recordings, tmp_path):
    store = build(recordings, tmp_path)
    one, again, other = (ClipSampler(store, range(8), size=900, seed=seed) for seed in (1, 1, 2))
    clips = one.batch(5, 4)
    assert clips.shape == (4, 1, 900)
    again.batch(4, 4)
    assert torch.equal(clips, again.batch(5, 4))
    assert not torch.equal(clips, other.batch(5, 4))
    short = ClipSampler(store, [store.names.index("voice1/5.wav")], size=900, seed=0).batch(0, 1)[0, 0]
    assert short[:480].abs().max() > 0
    assert short[480:].eq(0).all()
    with pytest.raises(ValueError, match="at least one recording"):
        ClipSampler(store, [], size=900, seed=0)


def test_one_name_is_held_out_in_all_voices(recordings, tmp_path):
    store = build(recordings, tmp_path)
    store.names = [f"voice{v}/{i}.wav" for v in range(3) for i in range(20)]
    training, held_out = split_recordings(store, 0.3)
    assert sorted(training + held_out) == list(range(60))
    assert 0 < len(held_out) < 60
    assert {i % 20 for i in training}.isdisjoint(i % 20 for i in held_out)

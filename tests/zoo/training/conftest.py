import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.training import DataRecipe, Recipe, loop
from tokenzoo.training.checkpoint import Checkpoint

TINY = {
    "image_size": 16,
    "num_tokens": 6,
    "codebook_size": 64,
    "code_dim": 4,
    "num_classes": 4,
    "luma_radius": 8,
    "chroma_radius": 4,
    "width": 8,
    "blocks": 1,
    "heads": 2,
    "condition_dim": 8,
}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of pictures that are smooth at a random scale, so that they can be told apart and predicted."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(12):
        coarse = random.integers(0, 256, (4 + index, 6 + index, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def recipe(photos, tmp_path):
    """Six steps of a tiny tokenizer."""
    data = DataRecipe(folder=str(photos), held_out=0.3, crop_size=16, smallest=16, largest=64, eval_crops=8)
    return Recipe(
        architecture="one_d_piece_nano",
        config=TINY,
        data=data,
        output=str(tmp_path / "run"),
        steps=6,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        initialise_items=200,
        log_every=2,
        save_every=3,
        eval_every=100,
        eval_items=4,
        eval_lengths=(2, 6),
    )


@pytest.fixture
def log():
    """The log of a recipe's run, a dictionary a line."""
    return lambda recipe: [json.loads(line) for line in (Path(recipe.output) / loop.LOG).read_text().splitlines()]


@pytest.fixture
def checkpoint():
    """The last checkpoint of a recipe's run."""
    return lambda recipe: Checkpoint.load(Path(recipe.output) / loop.CHECKPOINT)


@pytest.fixture
def same():
    """Whether tensors, and dictionaries and sequences of them, are equal to the last bit."""
    return _same


def _same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right

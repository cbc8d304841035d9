"""The ids that the authors printed for two images of ImageNet's validation set, with the published weights.

Sources: README and demo.ipynb of bytedance/1d-tokenizer@942a96f, demo.ipynb of turingmotors/One-D-Piece@473665d.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenzoo

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGES = os.environ.get("TOKENZOO_GOLDEN_IMAGES", "")
CASES = {"titok_l32.in1k": "titok_l32_tokens.json", "one_d_piece_l.in1k_256": "one_d_piece_l256_tokens.json"}


@pytest.mark.skipif(os.environ.get("TOKENZOO_ONLINE") != "1", reason="downloads 5 GB of weights: set TOKENZOO_ONLINE=1")
@pytest.mark.skipif(not IMAGES, reason="ImageNet images cannot be shipped: set TOKENZOO_GOLDEN_IMAGES to a folder with them")
@pytest.mark.parametrize("name", CASES)
def test_published_ids(name):
    tok = tokenzoo.load(name)
    for file, expected in json.loads((GOLDEN / CASES[name]).read_text()).items():
        picture = np.asarray(Image.open(Path(IMAGES, file)).convert("RGB"))
        assert picture.shape == (256, 256, 3), f"{file} is not the published one: {picture.shape}"
        ids = tok.encode(picture).ids[0, 0]
        wrong = int((ids != torch.tensor(expected)).sum())
        # The authors ran on a GPU, with TF32: a code that is nearly as close as the nearest one may win there.
        assert wrong <= 0.03 * len(expected), f"{wrong} of {len(expected)} ids of {file} differ"


@pytest.mark.parametrize("file", CASES.values())
def test_the_record_is_whole(file):
    for ids in json.loads((GOLDEN / file).read_text()).values():
        assert len(ids) == (32 if "l32" in file else 256)
        assert set(ids) <= set(range(4096))

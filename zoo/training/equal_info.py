"""`python -m tokenzoo.training.equal_info`: counts the byte model of equal-information windows on a folder of manuals.

    python -m tokenzoo.training.equal_info --data manuals --recipe word_pool_nano --out cards/nano

The recipe says which files of the folder are read and which are held out; of each language the first `--bytes` count. Two
files are written: the byte model, and the table of its 16-bit windows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from tokenzoo.tokenizers.pretrained import write_weights
from tokenzoo.tokenizers.text._byte_model import fit_model, odds_table
from tokenzoo.tokenizers.text.equal_info import EqualInfo, EqualInfoConfig
from tokenzoo.training.recipe import Recipe
from tokenzoo.training.texts import TextStore, find_texts

BYTES = 600_000
HASHED_BITS = 19
# How many decisions the lower orders' opinion counts for, order by order.
STRENGTHS = (1.0, 2.0, 2.0, 2.0, 2.0, 2.0)


def count(text: np.ndarray, *, hashed_bits: int = HASHED_BITS) -> EqualInfo:
    """A tokenizer of 64-bit windows with a byte model counted on a text, uint8 `(N,)`."""
    corrections, checks = fit_model(text, hashed_bits=hashed_bits, strengths=STRENGTHS)
    config = EqualInfoConfig(window_bits=64, frozen=False, orders=len(STRENGTHS), hashed_bits=hashed_bits)
    tokenizer = EqualInfo(config)
    tables = {"corrections": corrections, "checks": checks, "odds": odds_table()}
    tokenizer.load_state_dict({name: torch.from_numpy(table) for name, table in tables.items()})
    return tokenizer.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of unpacked manuals")
    parser.add_argument("--recipe", default="word_pool_nano", help="whose [data] says which files")
    parser.add_argument("--store", type=Path, default=Path("texts"), help="where their plain text is kept")
    parser.add_argument("--bytes", type=int, default=BYTES, help="of each language")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    options = parser.parse_args()
    data = Recipe.read(options.recipe).data
    names = find_texts(options.data, data.include, data.exclude)
    store = TextStore.build(options.data, names, options.store, held_out=data.held_out)
    streams = store.streams(held_out=False)
    tokenizer = count(np.concatenate([stream[: options.bytes] for stream in streams.values()]))
    write_weights(tokenizer.state_dict(), options.out / "equal_info_nano_model.manuals.safetensors")
    write_weights(EqualInfo.frozen(tokenizer).state_dict(), options.out / "equal_info_nano.manuals.safetensors")


if __name__ == "__main__":
    main()

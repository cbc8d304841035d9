"""What the release commands share: a run's averaged weights as bundled float16 ones, and their card.

A run may still be going on: its last checkpoint is read. Everything between the markers on the card, and the figures of its
front matter, is rewritten; the prose around them is not.
"""

import argparse
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from tokenzoo.card import parse_card
from tokenzoo.registry import tokenizer_class
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.training.checkpoint import Checkpoint
from tokenzoo.training.loop import CHECKPOINT
from tokenzoo.training.recipe import Recipe

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def averaged_weights(run: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights of a run's last checkpoint, in half precision, and its step."""
    checkpoint = Checkpoint.load(run / CHECKPOINT)
    return half_precision({**checkpoint.model, **checkpoint.averaged}), checkpoint.step


def half_precision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point weights as float16.

    Raises:
        ValueError: If a weight is too large for it.
    """
    halves = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
    for key, tensor in halves.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key} does not fit into float16: keep these weights in float32")
    return halves


def built(architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Tokenizer:
    """A tokenizer as `tokenzoo.load` would build it from these weights."""
    cls: Any = tokenizer_class(architecture)
    tokenizer: Tokenizer = cls(cls.config_class.from_dict(config))
    tokenizer.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return tokenizer.eval()


def with_measured(text: str, part: str) -> str:
    """The card with `part` between its markers.

    Raises:
        ValueError: If the card has no markers.
    """
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"expected the card to hold {BEGIN} and {END}: the measured part goes between them")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def with_source(text: str, weights: bytes, params: int) -> str:
    """The card with the digest, size and parameter count of the weights in its front matter.

    Raises:
        ValueError: If the front matter has no such lines.
    """
    values = {"sha256": hashlib.sha256(weights).hexdigest(), "size_mb": round(len(weights) / 1e6, 1), "params": params}
    for key, value in values.items():
        text, found = re.subn(rf"(?m)^(\s+{key}:).*$", rf"\g<1> {value}", text, count=1)
        if not found:
            raise ValueError(f"expected the card's front matter to have {key}")
    return text


def bundle(card: Path, text: str, state: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Writes `nano/<card>.safetensors` beside `card`, and the card's text with their figures in its front matter."""
    weights = save(dict(state))
    text = with_source(text, weights, sum(p.numel() for p in tokenizer.parameters()))
    parse_card(card.stem, text)
    write_atomically(card.parent / "nano" / f"{card.stem}.safetensors", weights)
    write_atomically(card, text.encode())


def command_line(description: str | None, media: str) -> argparse.ArgumentParser:
    """Options of a release command: `--run`, `--recipe`, `--data` (a folder of `media`) and `--card`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of the training run")
    parser.add_argument("--recipe", required=True, help="its recipe: a TOML file or the name of a bundled one")
    parser.add_argument("--data", required=True, help=f"folder of {media}")
    parser.add_argument("--card", type=Path, required=True, help="the card to refresh")
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the options name, with their folder of media."""
    plan = Recipe.read(arguments.recipe).to_dict()
    plan["data"]["folder"] = arguments.data
    return Recipe.from_dict(plan)

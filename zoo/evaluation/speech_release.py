"""`python -m tokenzoo.evaluation.speech_release`: bundles a speech tokenizer's averaged weights, and what they measure.

The run may still be going on: its last checkpoint is read. Measured are recordings that were held out, and those of a second
folder, of speakers who were never trained on. Everything between the markers on the card, and the figures of its front
matter, is rewritten; the prose around them is not. `tokenzoo.evaluation.speech` says what has to be installed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenzoo.evaluation import speech
from tokenzoo.evaluation.bundling import averaged_weights, built, bundle, command_line, recipe_of, with_measured
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.waveforms import Audio
from tokenzoo.training.recipe import Recipe, RecordingsRecipe
from tokenzoo.training.recordings import find_recordings
from tokenzoo.training.sources import prepare_clips

MOST_RECORDINGS = 32
_HEADS = ("STOI", "PESQ 8 kHz", "PESQ 16 kHz", "mel 8 kHz", "mel 16 kHz", "DNSMOS")


@dataclass(frozen=True)
class Row:
    """A system's mean figures on one set of recordings; `narrow` if it works at 8 kHz."""

    name: str
    bits_per_second: float
    found: Mapping[str, float]
    narrow: bool = False

    def cells(self) -> str:
        """The row of the table."""
        values = [
            "-"
            if self.narrow and name.endswith("_wb")
            else f"{self.found[name]:.2f}"
            if "pesq" in name or name == "dnsmos"
            else f"{self.found[name]:.3f}"
            for name in speech.METRICS
        ]
        return " | ".join([f"| {self.name}", f"{self.bits_per_second:.0f}", *values]) + " |"


def release(run: Path, recipe: Recipe, card: Path, others: Path) -> dict[str, list[Row]]:
    """Writes `nano/<card>.safetensors` beside `card` and refreshes the card.

    Args:
        run: Output folder of the training run.
        recipe: Its recipe, with the folder of recordings.
        card: The markdown file.
        others: Folder of recordings of other speakers.

    Returns:
        What was measured, by set of recordings; the tokenizer comes first.
    """
    if not isinstance(recipe.data, RecordingsRecipe):
        raise ValueError(f"expected a recipe of recordings, got {recipe.data}")
    state, step = averaged_weights(run)
    tokenizer = built(recipe.architecture, recipe.config, state)
    clips = prepare_clips(recipe.data, run / "recordings")
    store = clips.training.store
    sets = {
        "held out": chosen([store.recording(i).numpy() for i in clips.held_out_recordings]),
        "other speakers": chosen(_read(others)),
    }
    rows, used = {}, set()
    for name, originals in sets.items():
        decoded, codes = reconstructed(tokenizer, originals)
        mine = Row(f"**{card.stem}**", tokenizer.info.bits_per_second or 0.0, _measured(decoded, originals))
        rows[name] = [mine, *measured_peers(originals, run / f"peers_{name.replace(' ', '_')}.json")]
        used |= codes
    spent = step * recipe.batch_size * recipe.data.clip_samples / recipe.data.sample_rate / 3600
    bundle(card, refreshed(card.read_text(), sets, rows, spent, len(used)), state, tokenizer)
    return rows


def chosen(recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Up to `MOST_RECORDINGS` that can be measured, evenly spread over all."""
    long = [x for x in recordings if speech.measurable(x)]
    if not long:
        raise ValueError(f"expected recordings of a second or more to measure, got {len(recordings)} without any")
    return [long[i] for i in np.linspace(0, len(long) - 1, min(MOST_RECORDINGS, len(long))).round().astype(int)]


def reconstructed(tokenizer: Tokenizer, originals: Sequence[np.ndarray]) -> tuple[list[np.ndarray], set[int]]:
    """Recordings encoded and decoded, and the codes that they took."""
    decoded, codes = [], set()
    for x in originals:
        tokens = tokenizer.encode((torch.from_numpy(x)[None], speech.SAMPLE_RATE))
        codes |= set(tokens.ids.flatten().tolist())
        decoded.append(tokenizer.decode(tokens)[0][0].numpy())
    return decoded, codes


def measured_peers(originals: Sequence[np.ndarray], cache: Path) -> list[Row]:
    """The codecs on these recordings, kept in `cache`."""
    peers = speech.peers()
    identity = [hashlib.sha256(b"".join(x.tobytes() for x in originals)).hexdigest(), [peer.name for peer in peers]]
    if not cache.exists() or (kept := json.loads(cache.read_text()))["of"] != identity:
        found = [_measured(speech.reconstructions(peer, originals), originals) for peer in peers]
        kept = {"of": identity, "found": found}
        write_atomically(cache, json.dumps(kept).encode())
    return [Row(p.name, p.bits_per_second, found, p.narrow) for p, found in zip(peers, kept["found"], strict=True)]


def refreshed(
    text: str, sets: Mapping[str, Sequence[np.ndarray]], rows: Mapping[str, Sequence[Row]], hours: float, codes: int
) -> str:
    """The card with the measured part replaced.

    Raises:
        ValueError: If the card has no markers.
    """
    parts = [f"Measured by the bundled float16 weights, after {hours:.1f} hours of clips. {codes:,} codes were used."]
    for name, originals in sets.items():
        seconds = sum(len(x) for x in originals) / speech.SAMPLE_RATE
        own = np.mean([speech.dnsmos(x) for x in originals])
        lines = [
            f"{len(originals)} recordings, {name} ({seconds:.0f} s), whose own DNSMOS is {own:.2f}:",
            "",
            f"| | bit/s | {' | '.join(_HEADS)} |",
        ]
        lines += ["| --- |" + " ---: |" * (1 + len(_HEADS)), *(row.cells() for row in rows[name])]
        parts.append("\n".join(lines))
    return with_measured(text, "\n\n".join(parts))


def _measured(decoded: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> dict[str, float]:
    return speech.mean([speech.measure(y, x) for x, y in zip(originals, decoded, strict=True)])


def _read(folder: Path) -> list[np.ndarray]:
    media = Audio(speech.SAMPLE_RATE)
    return [media.read(folder / name)[0][0].numpy() for name in find_recordings(folder, ["*"])]


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "recordings")
    parser.add_argument("--others", type=Path, required=True, help="folder of recordings of other speakers")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    for name, rows in release(arguments.run, recipe_of(arguments), arguments.card, arguments.others).items():
        print(name, *(row.cells() for row in rows), sep="\n")


if __name__ == "__main__":
    main()

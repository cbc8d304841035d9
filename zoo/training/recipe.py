"""Recipes: a training run as a typed dataclass, read from TOML."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenzoo.tokenizers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MediaRecipe:
    """What is trained on: the data of a recipe.

    Attributes:
        folder: Folder of the media; empty in recipes that are shared, and then given on the command line.
        include: Globs over paths relative to the folder; `*` also matches `/`.
        exclude: Globs of what to leave out.
        held_out: Share that is never trained on: of the pictures, the recordings, the video files, or the documents in any
            language.
        seed: Of what is drawn for training.
    """

    folder: str = ""
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataRecipe(MediaRecipe):
    """Crops of a folder of photos.

    Attributes:
        crop_size: Side of a crop, in pixels.
        smallest: Shortest side of the smallest pyramid level, in pixels.
        largest: Shortest side of the largest pyramid level, in pixels.
        candidates: Crops drawn for each one kept, the most detailed.
        eval_crops: Held-out crops to evaluate on.
        eval_seed: Of the held-out crops.
    """

    crop_size: int = 64
    smallest: int = 64
    largest: int = 256
    candidates: int = 1
    eval_crops: int = 1024
    eval_seed: int = 1


@dataclass(frozen=True, kw_only=True)
class RecordingsRecipe(MediaRecipe):
    """Clips of a folder of recordings: `media = "recordings"` among the data of a recipe.

    Attributes:
        sample_rate: In Hz; that of the tokenizer.
        clip_samples: Samples of a clip.
        eval_clips: Held-out clips to evaluate on.
        eval_seed: Of the held-out clips.
    """

    sample_rate: int = 16000
    clip_samples: int = 16000
    eval_clips: int = 64
    eval_seed: int = 1


@dataclass(frozen=True, kw_only=True)
class ClipsRecipe(MediaRecipe):
    """Crops, in space and time, of a folder of video files: `media = "clips"` among the data of a recipe.

    Attributes:
        frames: Of a crop.
        crop_size: Side of a crop, in pixels.
        smallest: Shortest side of the smallest pyramid level, in pixels.
        largest: Shortest side of the largest pyramid level, in pixels.
        most_frames: Frames of a file that are decoded, from the first on.
        candidates: Crops drawn for each one kept, the most detailed.
        eval_clips: Held-out crops to evaluate on.
        eval_frames: Of a held-out crop; 0 for as many as in training.
        eval_size: Side of a held-out crop, in pixels; 0 for that of training.
        eval_seed: Of the held-out crops.
    """

    frames: int = 17
    crop_size: int = 64
    smallest: int = 64
    largest: int = 192
    most_frames: int = 256
    candidates: int = 1
    eval_clips: int = 32
    eval_frames: int = 0
    eval_size: int = 0
    eval_seed: int = 1


@dataclass(frozen=True, kw_only=True)
class TextsRecipe(MediaRecipe):
    """Windows of a folder of manuals: `media = "texts"` among the data of a recipe.

    Attributes:
        window: Bytes of a window.
        flatten: Languages are drawn in proportion to their bytes to this power.
        eval_bytes: Held-out bytes of each language to evaluate on.
    """

    held_out: float = 0.06
    window: int = 4096
    flatten: float = 0.5
    eval_bytes: int = 20_000


@dataclass(frozen=True, kw_only=True)
class AdversaryRecipe:
    """Discriminators of audio or clips that are trained along.

    Attributes:
        periods: Of the discriminators of audio by period, in samples.
        windows: Of the discriminators of audio by spectrum, in samples.
        width: Their channels after the first layer; 0 for no discriminators.
        start: Step from which on they are trained and heard.
        adversarial: Weight of the adversarial loss.
        features: Weight of the distance between activations.
        learning_rate: Of the discriminators.
        betas: Of their AdamW.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    windows: tuple[int, ...] = (512, 1024, 2048)
    width: int = 0
    start: int = 0
    adversarial: float = 1.0
    features: float = 1.0
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.8, 0.99)


_MEDIA = {"photos": DataRecipe, "recordings": RecordingsRecipe, "clips": ClipsRecipe, "texts": TextsRecipe}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        architecture: Key of the registry; empty when fine-tuning.
        config: Values of the architecture's config.
        start: Card name, Hub repository or folder to fine-tune from, as in `tokenzoo.load`.
        inherit: What to take first weights from when training from scratch, named as `start`: those of the same name and
            shape, in a tokenizer of any architecture.
        teacher: A trained tokenizer that this one learns from, named as `start`, where the architecture can (`learn_from`).
        data: What to train on; `media` in its table says what that is, photos by default.
        adversary: Discriminators; none by default. Their media is audio or clips.
        output: Folder for checkpoints, logs and the result.
        steps: Optimizer steps.
        batch_size: Items per step and process.
        learning_rate: After warm-up.
        warmup_steps: Of linear warm-up.
        decay_steps: Of linear decay to zero at the end.
        weight_decay: Of AdamW, on matrices only.
        betas: Of AdamW.
        clip_norm: Largest norm of the gradient.
        ema_decay: Of the averaged weights, which are evaluated and exported.
        freeze: Globs of parameters that are not trained. Modules that have no others are in eval mode throughout, so that
            codebooks are not restarted or averaged and statistics stay.
        precision: `no` or `bf16`, as accelerate names them.
        seed: Of everything random.
        initialise_items: Items handed to the tokenizer's `initialise`, if it has one.
        log_every: Steps between lines of the log.
        save_every: Steps between checkpoints.
        eval_every: Steps between evaluations.
        eval_items: Held-out items in those evaluations.
        eval_lengths: Token counts in those evaluations; empty for full length.
    """

    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    inherit: str = ""
    teacher: str = ""
    data: DataRecipe | RecordingsRecipe | ClipsRecipe | TextsRecipe = field(default_factory=DataRecipe)
    adversary: AdversaryRecipe = field(default_factory=AdversaryRecipe)
    output: str = "runs/latest"
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    freeze: tuple[str, ...] = ()
    precision: str = "no"
    seed: int = 0
    initialise_items: int = 60_000
    log_every: int = 50
    save_every: int = 500
    eval_every: int = 1000
    eval_items: int = 128
    eval_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.architecture) == bool(self.start):
            raise ConfigError("expected either architecture (train from scratch) or start (fine-tune) in the recipe")
        if self.inherit and self.start:
            raise ConfigError("expected inherit only beside architecture: what a run starts from is whole")
        if self.adversary.width and not isinstance(self.data, (RecordingsRecipe, ClipsRecipe)):
            raise ConfigError("recipe: expected data.media to be recordings or clips beside an adversary, which judges those")
        if self.precision not in ("no", "bf16"):
            raise ConfigError(f"recipe: expected precision to be no or bf16, got {self.precision!r}")
        for name in ("steps", "batch_size", "log_every", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recipe: expected {name} of at least 1, got {getattr(self, name)}")

    @classmethod
    def read(cls, recipe: str | Path) -> "Recipe":
        """Reads a TOML file, or the recipe of ours that has this name.

        Raises:
            ConfigError: If there is no such recipe, it is not TOML, or a key is unknown or has the wrong type.
        """
        path = Path(recipe)
        bundled = files("tokenzoo.training") / "recipes" / f"{recipe}.toml"
        if path.suffix != ".toml" and bundled.is_file():
            text = bundled.read_text()
        elif path.is_file():
            text = path.read_text()
        else:
            raise ConfigError(f"expected a TOML file or the name of a bundled recipe, found nothing at {recipe}")
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{recipe} is not TOML: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Builds the recipe from TOML or JSON values. Raises `ConfigError`."""
        for table in ("data", "config", "adversary"):
            if not isinstance(values.get(table, {}), Mapping):
                raise ConfigError(f"recipe: expected {table} to be a table, got {values[table]!r}")
        described = dict(values.get("data", {}))
        media = described.pop("media", "photos")
        if media not in _MEDIA:
            raise ConfigError(f"recipe: expected media to be one of {', '.join(_MEDIA)}, got {media!r}")
        data = _build(_MEDIA[media], described)
        adversary = _build(AdversaryRecipe, values.get("adversary", {}))
        return _build(cls, {**values, "data": data, "adversary": adversary})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with every field."""
        media = next(name for name, cls in _MEDIA.items() if isinstance(self.data, cls))
        values = dataclasses.asdict(self)
        return {**values, "data": {"media": media, **values["data"]}}


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(sorted(defaults))}"
            raise ConfigError(f"recipe: unknown key {key!r}: {hint}")
        built[key] = _converted(key, value, defaults[key])
    return cls(**built)


def _converted(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of the field's default: lists become tuples, whole numbers floats."""
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"recipe: expected {key} to be a list, got {value!r}")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int):
        return float(value)
    if isinstance(default, (str, int, float)) and type(value) is not type(default):
        raise ConfigError(f"recipe: expected {key} to be a {type(default).__name__}, got {value!r}")
    return value

"""Reading recordings of any kind into `[C, S]` at a network's sample rate, and putting reconstructions back into theirs.

Channels: a network with one channel hears the mean of all; one with two hears a mono recording twice, a stereo one as it
is, and the mean of all channels twice where there are more. Sample rates: Hann-windowed sinc interpolation, torchaudio's
defaults (6 zero crossings, roll-off 0.99), after the channels. Nothing is normalised and nothing is clipped.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from tokenzoo.tokenizers._torchaudio import torchaudio
from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import media_path

_MOST_CHANNELS = 8
_LOUDEST = 4.0  # 12 dB above full scale: decoded MP3s and float files overshoot; integers given as floats are far beyond
_LARGEST_FILTER = 1 << 26
_RESAMPLED_AT_ONCE = 1 << 22
_FULL_SCALE = {np.dtype(np.int16): 2**15, np.dtype(np.int32): 2**31}


@dataclass(frozen=True)
class Audio:
    """The audio side of a tokenizer.

    Attributes:
        sample_rate: What the network hears, in Hz.
        channels: What the network hears: 1 or 2.
    """

    sample_rate: int
    channels: int = 1

    def items(self, media: Any) -> Sequence[Any]:
        """The recordings in what the user passed: a list, the first dimension of a 3-D array, or the one recording."""
        if isinstance(media, tuple) and len(media) == 2 and _is_rate(media[1]):
            return [media]
        if isinstance(media, (list, tuple)):
            return media
        if isinstance(media, (Tensor, np.ndarray)) and media.ndim == 3:
            return list(media)
        return [media]

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """One recording as float32 `[channels, S]` at `sample_rate`.

        An array or tensor without a sample rate is taken to be at the network's.

        Raises:
            MediaError: If it is not a recording, is damaged or empty, or has values that are not finite or far beyond 1.
        """
        waveform, rate = read_audio(item)
        rate = self.sample_rate if rate is None else rate
        meta = {"samples": waveform.shape[1], "sample_rate": rate, "channels": len(waveform)}
        return resample(mix(waveform, self.channels), rate, self.sample_rate).contiguous(), meta

    def trim(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """A reconstruction `[channels, S']`, whole frames, as the samples that the network was given, in [-1, 1].

        It is limited in place, so that hours of audio are not held twice.
        """
        if "samples" in meta:
            heard = resampled_length(int(meta["samples"]), int(meta["sample_rate"]), self.sample_rate)
            reconstruction = reconstruction[:, :heard]
        return reconstruction.clamp_(-1, 1)

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """A reconstruction `[channels, S']` as the original's samples at its sample rate, in [-1, 1].

        Channels are the network's, but a recording that was mono is mono again. Without `meta`, as of tokens that a
        language model wrote, whole frames at the network's sample rate. As in `trim`, the reconstruction is limited in place.
        """
        waveform = self.trim(reconstruction, meta)
        if meta.get("channels") == 1:
            waveform = mix(waveform, 1)
        if "samples" not in meta or int(meta["sample_rate"]) == self.sample_rate:
            return waveform
        return resample(waveform, self.sample_rate, int(meta["sample_rate"]))[:, : int(meta["samples"])].clamp_(-1, 1)


def read_audio(item: Any) -> tuple[Tensor, int | None]:
    """A recording in any of the forms a user may hold.

    Args:
        item: A path or encoded bytes (WAV, FLAC, Ogg or MP3, 8 to 32 bits or floating point), or an array or tensor
            `(C, S)` or `(S,)` of floating point in [-1, 1], int16, int32 or uint8, by itself or as `(waveform, sample
            rate in Hz)`.

    Returns:
        float32 `[C, S]`, and its sample rate in Hz, `None` where it came without one.

    Raises:
        MediaError: If it is none of these, damaged, empty, has more than 8 channels, or values that are not finite or
            far beyond 1.
    """
    if isinstance(item, tuple):
        if len(item) != 2 or not _is_rate(item[1]):
            raise MediaError(f"expected (waveform, sample rate in Hz), got {_shown(item)}")
        waveform, _ = read_audio(item[0])
        return waveform, int(item[1])
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(item), f"these {len(item)} bytes")
    if isinstance(item, (str, os.PathLike)):
        path = media_path(item)
        return _open(path, str(path))
    if isinstance(item, Tensor):
        tensor = item.detach().cpu()
        return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy()), None
    if isinstance(item, np.ndarray):
        return _from_array(item), None
    raise MediaError(
        f"expected a recording: a path, bytes, an array or a tensor, or (waveform, sample rate), got {type(item).__name__}"
    )


def mix(waveform: Tensor, channels: int) -> Tensor:
    """A waveform `[C, S]` with as many channels as asked for, by the rule above."""
    if len(waveform) == channels:
        return waveform
    return waveform.mean(0, keepdim=True).expand(channels, -1)


def resample(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """A waveform `[C, S]` at another sample rate in Hz: `[C, ceil(S * wanted / rate)]`.

    Raises:
        MediaError: If the rates have so small a common divisor that the filters would take gigabytes.
    """
    common = math.gcd(rate, wanted)
    if rate == wanted:
        return waveform
    if (rate // common) * (wanted // common) > _LARGEST_FILTER:
        raise MediaError(
            f"resampling from {rate} Hz to {wanted} Hz needs {wanted // common} filters of {rate // common} taps: resample "
            "this recording to a common rate, such as 48000 Hz, first"
        )
    if waveform.shape[1] <= _RESAMPLED_AT_ONCE:
        return torchaudio.functional.resample(waveform, rate, wanted)
    return _resample_pieces(waveform, rate // common, wanted // common)


def _resample_pieces(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """`resample` in bounded memory, for rates without common divisor; each piece hears what its filters reach."""
    convert = torchaudio.transforms.Resample(rate, wanted)
    step, context = (-(-count // rate) * rate for count in (_RESAMPLED_AT_ONCE, convert.width + rate))
    resampled = waveform.new_empty(len(waveform), resampled_length(waveform.shape[1], rate, wanted))
    for at in range(0, waveform.shape[1], step):
        low = max(0, at - context)
        piece = convert(waveform[:, low : at + step + context])[:, (at - low) // rate * wanted :]
        place = resampled[:, at // rate * wanted : (at + step) // rate * wanted]
        place.copy_(piece[:, : place.shape[1]])
    return resampled


def resampled_length(samples: int, rate: int, wanted: int) -> int:
    """How many samples `resample` makes of so many."""
    return -(-samples * wanted // rate)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) > 0


def _shown(item: tuple[Any, ...]) -> str:
    parts = ", ".join(str(x) if isinstance(x, (int, float, str)) else type(x).__name__ for x in item[:3])
    return f"({parts}{', ...' if len(item) > 3 else ''})"


def _open(source: Any, name: str) -> tuple[Tensor, int]:
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).strip().rstrip(".")
        raise MediaError(
            f"{name}: not a recording that libsndfile can read (WAV, FLAC, Ogg, MP3), or damaged: {reason}"
        ) from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise MediaError(f"{name}: cannot be read as a recording: {error}") from error
    return _checked(torch.from_numpy(samples).T, name), int(rate)


def _from_array(array: np.ndarray) -> Tensor:
    given = f"{array.dtype} {array.shape}"
    waveform: np.ndarray
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise MediaError(f"expected audio (C, S) or (S,), got {given}: pass a list to encode several recordings")
    if array.dtype == np.uint8:
        waveform = (array.astype(np.float32) - 128) / 128
    elif array.dtype in _FULL_SCALE:
        waveform = array.astype(np.float32) / np.float32(_FULL_SCALE[array.dtype])
    elif np.issubdtype(array.dtype, np.floating):
        waveform = array.astype(np.float32, copy=False)
    else:
        raise MediaError(f"expected audio of floating point in [-1, 1], int16, int32 or uint8, got {given}")
    return _checked(torch.from_numpy(waveform), f"audio {given}")


def _checked(waveform: Tensor, name: str) -> Tensor:
    channels, samples = waveform.shape
    if not samples or not channels:
        raise MediaError(f"{name}: has no samples")
    if channels > _MOST_CHANNELS:
        raise MediaError(
            f"{name}: expected at most {_MOST_CHANNELS} channels, got {channels}: channels come first, (C, S), so transpose "
            "what soundfile or scipy returned"
        )
    low, high = (float(value) for value in waveform.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MediaError(f"{name}: has samples that are not finite")
    if max(-low, high) > _LOUDEST:
        raise MediaError(f"{name}: expected samples in [-1, 1], got {low:.4g} to {high:.4g}: divide by the full scale")
    return waveform

"""How close decoded speech is to the original: STOI, PESQ, mel distance, DNSMOS; and the codecs that people would use instead.

Needs the extra `speech` (pystoi, pesq, and speechmos, whose network is run by onnxruntime), and for the codecs the programs
`c2enc`, `c2dec`, `opusenc` and `opusdec` (Debian packages `codec2` and `opus-tools`). Everything is measured at 16 kHz.
"""

import io
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from tokenzoo.tokenizers.audio.mel import mel_distance
from tokenzoo.tokenizers.waveforms import resample

SAMPLE_RATE, NARROW = 16000, 8000
METRICS = ("stoi", "pesq_nb", "pesq_wb", "mel_nb", "mel_wb", "dnsmos")
_LONGEST_DELAY, _DELAY_STEP = 0.06, 0.00125
_OFFSETS, _TRIED = range(-80, 81, 20), 8
_DNSMOS_SECONDS = 9.01
_DNSMOS_SCALE = (-0.06766283, 1.11546468, 0.04602535)  # of the overall score, as speechmos has it
_NOT_MEASURABLE = 1e-4  # pystoi answers 1e-5 for what is too short or too quiet

Waveform = np.ndarray


@dataclass(frozen=True)
class Peer:
    """A codec.

    Attributes:
        name: For tables.
        bits_per_second: Nominal, without the container.
        decoded: float32 `(S,)` at 16 kHz to what comes back, which may be late and of another length.
        narrow: Whether it works at 8 kHz.
        late: Whether what comes back is late, so that it has to be aligned.
    """

    name: str
    bits_per_second: int
    decoded: Callable[[Waveform], Waveform]
    narrow: bool = False
    late: bool = False


def codec2(mode: str, bits_per_second: int) -> Peer:
    """Codec 2 in a mode that `c2enc` knows."""
    return Peer(f"Codec2 {mode}", bits_per_second, lambda x: _codec2(x, mode), narrow=True, late=True)


def opus(kbps: int) -> Peer:
    """Opus, at its best for speech."""
    return Peer(f"Opus {kbps}k", 1000 * kbps, lambda x: _opus(x, kbps))


def peers() -> list[Peer]:
    """The codecs nearest in bitrate."""
    return [codec2("700C", 700), codec2("1200", 1200), codec2("1300", 1300), opus(6)]


def _codec2(x: Waveform, mode: str) -> Waveform:
    samples = (_resampled(x, SAMPLE_RATE, NARROW).clip(-1, 1) * 32767).astype("<i2").tobytes()
    # The last frame is only coded when it is full.
    bits = _run(["c2enc", mode, "-", "-"], samples + bytes(2 * NARROW // 10))
    decoded = np.frombuffer(_run(["c2dec", mode, "-", "-"], bits), "<i2").astype(np.float32) / 32767
    return _resampled(decoded, NARROW, SAMPLE_RATE)


def _opus(x: Waveform, kbps: int) -> Waveform:
    file = io.BytesIO()
    soundfile.write(file, x, SAMPLE_RATE, "PCM_16", format="WAV")
    options = ["--quiet", "--bitrate", str(kbps), "--hard-cbr", "--comp", "10", "--speech"]
    with tempfile.TemporaryDirectory() as folder:
        coded, decoded = Path(folder) / "x.opus", Path(folder) / "x.wav"
        _run(["opusenc", *options, "-", str(coded)], file.getvalue())
        _run(["opusdec", "--quiet", "--rate", str(SAMPLE_RATE), str(coded), str(decoded)], b"")
        return soundfile.read(decoded, dtype="float32")[0]


def _run(command: Sequence[str], data: bytes) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout


def reconstructions(peer: Peer, originals: Sequence[Waveform]) -> list[Waveform]:
    """What a codec makes of recordings, as long as they are.

    A late one is shifted by one delay for all: of those near the one at which loudness agrees best, that with the highest STOI.
    """
    decoded = [peer.decoded(x) for x in originals]
    delay = 0
    if peer.late:
        near = _delay(decoded, originals)
        some = list(zip(originals, decoded, strict=True))[:_TRIED]
        delays = (near + offset for offset in _OFFSETS if near + offset >= 0)
        delay = max(delays, key=lambda d: float(np.mean([stoi(_shifted(y, d, len(x)), x) for x, y in some])))
    return [_shifted(y, delay, len(x)) for x, y in zip(originals, decoded, strict=True)]


def _delay(decoded: Sequence[Waveform], originals: Sequence[Waveform]) -> int:
    """Samples by which all are late, at which the correlation of their loudness is highest."""
    step = round(_DELAY_STEP * SAMPLE_RATE)
    delays = range(0, round(_LONGEST_DELAY * SAMPLE_RATE) + 1, step)
    total = np.zeros(len(delays))
    for x, y in zip(originals, decoded, strict=True):
        loudness = _loudness(x, step)
        for i in range(len(delays)):
            total[i] += np.corrcoef(loudness, _loudness(_shifted(y, delays[i], len(x)), step))[0, 1]
    return delays[int(total.argmax())]


def _loudness(x: Waveform, step: int) -> Waveform:
    """Logarithm of the power around every `step`-th sample, over some milliseconds."""
    power = np.convolve(np.square(x), np.hanning(16 * step), "same")[::step]
    return np.log(power + 1e-5)


def _shifted(y: Waveform, delay: int, size: int) -> Waveform:
    """`size` samples of `y`, which is `delay` samples late."""
    return np.pad(y[delay:], (0, size))[:size]


def measurable(x: Waveform) -> bool:
    """Whether a recording has the third of a second of sound that STOI needs."""
    return len(x) >= SAMPLE_RATE and stoi(x, x) > _NOT_MEASURABLE


def stoi(decoded: Waveform, original: Waveform) -> float:
    """Short-time objective intelligibility, up to 1."""
    from pystoi import stoi as measure

    return float(measure(original, decoded, SAMPLE_RATE))


def measure(decoded: Waveform, original: Waveform) -> dict[str, float]:
    """All of `METRICS`; those ending in `nb` compare both sides at 8 kHz."""
    from pesq import pesq

    narrow = [_resampled(side, SAMPLE_RATE, NARROW) for side in (original, decoded)]
    return {
        "stoi": stoi(decoded, original),
        "pesq_nb": float(pesq(NARROW, *narrow, "nb")),
        "pesq_wb": float(pesq(SAMPLE_RATE, original, decoded, "wb")),
        "mel_nb": _mel(narrow[1], narrow[0], NARROW),
        "mel_wb": _mel(decoded, original, SAMPLE_RATE),
        "dnsmos": dnsmos(decoded),
    }


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every metric over the recordings."""
    return {name: float(np.mean([one[name] for one in found])) for name in METRICS}


def dnsmos(x: Waveform) -> float:
    """Overall DNSMOS P.835 (https://arxiv.org/abs/2110.01763) of a recording, in windows of 9 seconds that overlap by half.

    What is shorter is repeated until it fills one.
    """
    size = int(_DNSMOS_SECONDS * SAMPLE_RATE)
    if len(x) < size:
        x = np.resize(x, size)
    starts = range(0, len(x) - size + 1, size // 2)
    scores = [_dnsmos_network().run(None, {"input_1": x[None, at : at + size].astype(np.float32)})[0][0][2] for at in starts]
    return float(np.mean(np.poly1d(_DNSMOS_SCALE)(np.array(scores))))


@cache
def _dnsmos_network() -> Any:
    import onnxruntime

    spec = find_spec("speechmos")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("expected the package speechmos, whose files hold the network of DNSMOS: pip install speechmos")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = Path(spec.submodule_search_locations[0]) / "dnsmos_models" / "sig_bak_ovr.onnx"
    return onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])


def _mel(decoded: Waveform, original: Waveform, sample_rate: int) -> float:
    x, y = (torch.from_numpy(np.ascontiguousarray(side))[None, None] for side in (decoded, original))
    return float(mel_distance(x, y, sample_rate))


def _resampled(x: Waveform, rate: int, wanted: int) -> Waveform:
    return resample(torch.from_numpy(np.ascontiguousarray(x))[None], rate, wanted)[0].numpy()

import io
import struct
from fractions import Fraction

import numpy as np
import pytest

from tokenzoo.tokenizers import MediaError, video_files
from tokenzoo.tokenizers.video_files import Sampling, open_video, read_video

av = pytest.importorskip("av")

BITS, HEIGHT, WIDTH = 8, 48, 128
BACKENDS = ["decord", "av"]


def picture(number, height=HEIGHT, width=WIDTH):
    """A frame that carries its number as a binary pattern: one bright or dark bar per bit."""
    bars = (number >> np.arange(BITS)) & 1
    columns = np.where(bars, 235, 20)[np.arange(width) * BITS // width]
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).astype(np.uint8)


def number_of(frame):
    width = frame.shape[1]
    middles = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    return int(((frame[:, middles].mean((0, 2)) > 127) << np.arange(BITS)).sum())


def encode(count=90, file_format="mp4", codec="libx264", times=None, height=HEIGHT, width=WIDTH, **options):
    """A video whose B-frames and groups of 12 pictures make seeking hard."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec} here")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file_format) as container:
        stream = container.add_stream(codec, rate=30, options={"bf": "3", "g": "12", **options})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if width % 2 else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(i, height, width)), format="rgb24")
            frame.pts = i if times is None else int(times[i])
            if times is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip():
    return encode()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_exact_in_any_order(clip, backend, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    with open_video(path, backend=backend) as reader:
        assert (len(reader.times), reader.height, reader.width) == (90, HEIGHT, WIDTH)
        assert reader.fps == pytest.approx(30)
        np.testing.assert_allclose(reader.times, np.arange(90) / 30, atol=1e-5)
        shuffled = np.random.default_rng(0).permutation(90)[:30].tolist()
        for indices in ([0], [89, 0, 89], list(range(89, -1, -4)), shuffled, [13, 12, 11, 47]):
            assert [number_of(frame) for frame in reader.frames(indices)] == indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("file_format", "codec", "options"),
    [
        ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"}),
        ("webm", "libvpx-vp9", {}),
        ("matroska", "libx264", {}),
    ],
)
def test_kinds_of_files_that_both_count_exactly(file_format, codec, options, backend):
    data = encode(60, file_format, codec, **options)
    with open_video(data, backend=backend) as reader:
        indices = [59, 30, 13, 12, 11, 37, 0]
        assert [number_of(frame) for frame in reader.frames(indices)] == indices


@pytest.mark.parametrize(("file_format", "codec"), [("avi", "mpeg4"), ("mpegts", "libx264")])
def test_what_decord_miscounts_goes_to_pyav(file_format, codec, monkeypatch):
    data = encode(60, file_format, codec)
    with open_video(data) as reader:
        assert isinstance(reader, video_files.PyAVReader)
        assert [number_of(frame) for frame in reader.frames([59, 13, 12, 0, 30])] == [59, 13, 12, 0, 30]
    monkeypatch.setattr(video_files, "has_pyav", lambda: False)
    with pytest.raises(MediaError, match=r"tokenzoo\[video\]"):
        open_video(data)


def test_a_start_cut_off_by_an_edit_list(clip):
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(10 / 30 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    frames, _, times = read_video(buffer.getvalue())
    assert [number_of(frame) for frame in frames] == list(range(10, 90))
    assert times[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_frame_rate(backend):
    shown = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(10, 120, 59))])
    data = encode(60, times=shown)
    wanted = np.arange(int(shown[-1] / 125) + 1) * 0.125
    expected = [int((shown / 1000 <= t + 1e-6).sum()) - 1 for t in wanted]
    frames, fps, times = read_video(data, Sampling("fps", 8), backend=backend)
    assert [number_of(frame) for frame in frames] == expected
    assert fps == 8
    assert (np.diff(times) >= 0).all()
    assert read_video(data, backend=backend).fps == pytest.approx(59000 / shown[-1], rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_in_the_metadata_is_applied(clip, backend):
    turned = bytearray(clip)
    at = turned.index(b"tkhd") + 44
    turned[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    with open_video(bytes(turned), backend=backend) as reader:
        assert (reader.height, reader.width) == (WIDTH, HEIGHT)
        frame = reader.frames([37])[0]
    assert frame.shape == (WIDTH, HEIGHT, 3)
    assert number_of(np.rot90(frame)) == 37


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes_and_both_backends_give_the_same_pixels(backend):
    data = encode(12, height=47, width=129)
    frames = read_video(data, backend=backend).frames
    assert frames.shape == (12, 47, 129, 3)
    assert [number_of(frame) for frame in frames] == list(range(12))
    assert np.array_equal(frames, read_video(data, backend="av").frames)


@pytest.mark.parametrize("width", [8, 16, 32, 48, 96, 144, 160])
def test_widths_at_which_decord_pads_rows_by_whole_channels(width):
    data = encode(3, height=24, width=width)
    frames = read_video(data, backend="decord").frames
    assert frames.shape == (3, 24, width, 3)
    assert np.array_equal(frames, read_video(data, backend="av").frames)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "flags"), [("clip.mp4", {}), ("clip.mkv", {}), ("fast.mp4", {"movflags": "faststart"})])
def test_truncated_files_are_refused(name, flags, backend, clip, tmp_path):
    path = tmp_path / name
    with av.open(io.BytesIO(clip)) as source, av.open(str(path), "w", options=flags) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(MediaError, match=rf"{name}: .*damaged"):
        read_video(path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_video_is_refused(backend, tmp_path):
    with pytest.raises(MediaError, match="no video stream"):
        read_video(sound(), backend=backend)
    with pytest.raises(MediaError, match="not a video"):
        read_video(np.random.default_rng(0).bytes(5000), backend=backend)
    with pytest.raises(MediaError, match="0 bytes"):
        read_video(b"", backend=backend)
    with pytest.raises(MediaError, match="does not exist"):
        read_video(tmp_path / "missing.mp4", backend=backend)
    with pytest.raises(MediaError, match="folder"):
        read_video(tmp_path, backend=backend)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(MediaError, match="empty"):
        read_video(empty, backend=backend)


def test_a_decoder_that_hangs_is_ended(clip, monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(video_files, "_WORKER", worker)
    monkeypatch.setattr(video_files, "_PATIENCE", 0.5)
    with pytest.raises(MediaError, match=r"nothing could be decoded for 0\.5 s"):
        read_video(clip, backend="decord")


def test_files_too_long_are_refused_before_they_are_decoded(clip, monkeypatch):
    monkeypatch.setattr(video_files, "_LARGEST_CLIP", 50 * HEIGHT * WIDTH * 3)
    with pytest.raises(MediaError, match=r"90 frames of 128 x 48 take .*Sampling"):
        read_video(clip, backend="av")
    assert len(read_video(clip, Sampling("uniform", 50), backend="av").frames) == 50


def test_few_frames_of_a_long_file_are_sought_by_pyav(clip, monkeypatch):
    monkeypatch.setattr(video_files, "_LONGEST_RUN", 40)
    used = []
    monkeypatch.setattr(
        video_files.DecordReader, "frames", lambda self, indices: used.append(indices) or np.zeros((1, 1, 1, 3))
    )
    assert number_of(read_video(clip, Sampling("uniform", 2)).frames[1]) == 89
    assert used == [[0]]


def test_samplings():
    times = np.arange(100) / 25
    assert Sampling().indices(times).tolist() == list(range(100))
    assert Sampling("uniform", 4).indices(times).tolist() == np.linspace(0, 99, 4, dtype=int).tolist() == [0, 33, 66, 99]
    assert Sampling("uniform", 1).indices(times).tolist() == [0]
    assert Sampling("segments", 4).indices(times).tolist() == [12, 37, 62, 87]
    assert Sampling("segments", 200).indices(times[:2]).tolist() == [0] * 100 + [1] * 100
    assert Sampling("fps", 5).indices(times).tolist() == list(range(0, 100, 5))
    assert Sampling("fps", 50).indices(times[:3]).tolist() == [0, 0, 1, 1, 2]
    for by, value in (("uniform", 0), ("segments", 2.5), ("fps", -1), ("fps", float("nan"))):
        with pytest.raises(ValueError, match="above 0"):
            Sampling(by, value)

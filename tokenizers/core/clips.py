"""Reading clips of any kind into `[T, 3, H, W]`, and putting reconstructions back into their frames and size.

Time comes first everywhere: in what is read, in the batches `[B, T, 3, H, W]` that a system's hooks get, and in what is
decoded. A network over `[B, 3, T, H, W]` takes `batch.transpose(1, 2)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.images import Images, read_image
from tokenzoo.tokenizers.video_files import Sampling, is_file, read_video


@dataclass(frozen=True)
class Video:
    """The video side of a tokenizer.

    Attributes:
        size: Height and width the network sees, in pixels; with `fit="pad"` it is not used.
        fit: `"crop"`, `"adm"` and `"stretch"` resize every frame as `Images` does; `"pad"` keeps the size, and repeats the
            last row and column until `stride` divides height and width.
        stride: Pixels per step of the token grid, with `fit="pad"`.
        frame_stride: Frames per step of the token grid. The last frame is repeated until it divides the number of frames.
        lone_first: Whether the first frame makes a step by itself, as in causal networks: `1 + k * frame_stride` frames.
        sampling: Which frames of a file are read. Clips given as arrays, tensors or pictures are taken whole.
    """

    size: int = 256
    fit: Literal["crop", "adm", "stretch", "pad"] = "pad"
    stride: int = 1
    frame_stride: int = 1
    lone_first: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def items(self, media: Any) -> Sequence[Any]:
        """The clips in what the user passed: a list, the first dimension of a 5-D array, or the one clip.

        A list of pictures (Pillow images, or arrays of 3 dimensions) is one clip; a list of anything else is many.
        """
        if _is_timed(media):
            return [media]
        if isinstance(media, (list, tuple)):
            return [media] if media and all(map(_is_frame, media)) else media
        if isinstance(media, (Tensor, np.ndarray)) and media.ndim == 5:
            return list(media)
        return [media]

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """One clip as float32 `[T, 3, H, W]` in [0, 1], padded to whole steps.

        Raises:
            MediaError: If it is not a clip, is damaged or empty, or has values that are not finite or outside [0, 1].
        """
        frames, fps = read_clip(item, self.sampling)
        source = [int(n) for n in frames.shape[2:]]
        clip, size = self.fitted(frames)
        meta = {"frames": len(clip), "size": size, "source_size": source}
        if fps is not None:
            meta["fps"] = fps
        missing = self.padded_frames(len(clip)) - len(clip)
        return torch.cat([clip, clip[-1:].expand(missing, -1, -1, -1)]) if missing else clip, meta

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """A reconstruction `[T', 3, H', W']` with the frames and at the size of what was encoded, in [0, 1].

        Without `meta`, as of tokens that a language model wrote, all frames at the network's size.
        """
        clip = reconstruction[: int(meta.get("frames", len(reconstruction)))].clamp(0, 1)
        height, width = (int(n) for n in meta.get("size", clip.shape[2:]))
        if self.fit == "pad":
            return clip[:, :, :height, :width]
        images = Images(self.size, self.fit)
        return torch.stack([images.restore(frame, {"size": (height, width)}) for frame in clip])

    def padded_frames(self, frames: int) -> int:
        """The number of frames that the network sees of a clip of so many."""
        first = int(self.lone_first)
        return first + -(-max(frames - first, 0) // self.frame_stride) * self.frame_stride

    def fitted(self, frames: Tensor) -> tuple[Tensor, list[int]]:
        """Frames uint8 or float32 `[T, 3, H, W]` at the network's size, and the size that is restored."""
        height, width = frames.shape[2:]
        if self.fit == "pad":
            clip = frames.float().div_(255) if frames.dtype == torch.uint8 else frames
            below, right = -height % self.stride, -width % self.stride
            padded = F.pad(clip, (0, right, 0, below), mode="replicate") if below or right else clip
            return padded.contiguous(), [height, width]
        images = Images(self.size, self.fit)
        if frames.dtype == torch.uint8:
            read = [images.read(Image.fromarray(np.ascontiguousarray(f.permute(1, 2, 0).numpy()))) for f in frames]
        else:
            read = [images.read(frame) for frame in frames]
        return torch.stack([tensor for tensor, _ in read]), list(read[0][1]["size"])


def read_clip(item: Any, sampling: Sampling | None = None) -> tuple[Tensor, float | None]:
    """A clip in any of the forms a user may hold.

    Args:
        item: A path or encoded bytes of a video file; an array or tensor of a clip, `(T, H, W, 3)` or `(T, 3, H, W)`, uint8
            or floating point in [0, 1] (uint8 is looked at as channels-last first, floating point as channels-first); a
            picture (`read_image`) per frame in a list; or any of these but a file with its rate, `(clip, fps)`.
        sampling: Which frames of a file are read.

    Returns:
        uint8 or float32 `[T, 3, H, W]`, and its frames per second, `None` where it came without.

    Raises:
        MediaError: If it is none of these, damaged, empty, or holds values outside their range.
    """
    if _is_timed(item):
        return read_clip(item[0])[0], float(item[1])
    if is_file(item):
        frames, fps, _ = read_video(item, sampling)
        return torch.from_numpy(frames).permute(0, 3, 1, 2), fps
    if isinstance(item, Tensor):
        tensor = item.detach().cpu()
        return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy()), None
    if isinstance(item, np.ndarray):
        return _from_array(item), None
    if _is_frame(item):
        item = [item]
    if isinstance(item, (list, tuple)) and item:
        return _from_pictures(item), None
    raise MediaError(
        "expected a clip: a path, bytes, an array or tensor (T, H, W, 3) or (T, 3, H, W), or a list of pictures, got "
        + (f"an empty {type(item).__name__}" if isinstance(item, (list, tuple)) else type(item).__name__)
    )


def _is_timed(item: Any) -> bool:
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float, np.number))):
        return False
    return not isinstance(item[1], bool) and bool(item[1] > 0) and not is_file(item[0])


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (Tensor, np.ndarray)) and item.ndim == 3)


def _from_array(array: np.ndarray) -> Tensor:
    given = f"{array.dtype} {array.shape}"
    floating = np.issubdtype(array.dtype, np.floating)
    if array.dtype != np.uint8 and not floating:
        raise MediaError(f"expected a clip of uint8, or of floating point in [0, 1], got {given}")
    if array.ndim != 4 or not array.size or 3 not in (array.shape[1], array.shape[3]):
        raise MediaError(
            f"expected a clip (T, H, W, 3) or (T, 3, H, W) with pixels, got {given}: pass a list to encode several"
        )
    first = array.shape[1] == 3 if floating or array.shape[3] != 3 else False
    clip = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32 if floating else np.uint8))
    clip = clip if first else clip.permute(0, 3, 1, 2)
    if floating:
        low, high = (float(value) for value in clip.aminmax())
        if not (low >= 0 and high <= 1):
            raise MediaError(f"expected a floating-point clip with values in [0, 1], got {given} from {low:.4g} to {high:.4g}")
    return clip


def _from_pictures(pictures: Sequence[Any]) -> Tensor:
    frames: list[Tensor] = []
    for at, picture in enumerate(pictures):
        if not _is_frame(picture):
            raise MediaError(f"expected a list of pictures as a clip, got {type(picture).__name__} at {at}")
        frame = read_image(picture)
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1) if isinstance(frame, Image.Image) else frame
        if frames and (pixels.shape != frames[0].shape or pixels.dtype != frames[0].dtype):
            raise MediaError(
                f"expected frames of one size and kind, got {pixels.dtype} {tuple(pixels.shape)} at {at} after "
                f"{frames[0].dtype} {tuple(frames[0].shape)}"
            )
        frames.append(pixels)
    return torch.stack(frames)

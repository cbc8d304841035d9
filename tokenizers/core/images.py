"""Reading pictures of any kind into `[3, size, size]`, and putting reconstructions back into their original size."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import media_path

_LONGEST_ASPECT = 16


@dataclass(frozen=True)
class Images:
    """The image side of a tokenizer.

    Attributes:
        size: Height and width the network sees, in pixels.
        fit: `"crop"` resizes the short side to `size` and keeps the centre, as most published tokenizers were evaluated;
            `"adm"` does so as ADM (https://arxiv.org/abs/2105.05233) and its heirs do, first halving a picture with a box
            filter while its short side is at least twice `size`; `"stretch"` resizes both sides, so that nothing is lost.
    """

    size: int
    fit: Literal["crop", "adm", "stretch"] = "crop"

    def items(self, media: Any) -> Sequence[Any]:
        """The pictures in what the user passed: a list, the first dimension of a 4-D array, or the one picture."""
        if isinstance(media, (list, tuple)):
            return media
        if isinstance(media, (Tensor, np.ndarray)) and media.ndim == 4:
            return list(media)
        return [media]

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """One picture as float32 `[3, size, size]` in [0, 1].

        8-bit pictures are resized by Pillow (bicubic, antialiased), as the published pipelines do, so ids match theirs;
        floating-point ones stay in floating point.

        Raises:
            MediaError: If it is not a picture, is damaged, or has values that are not finite or outside [0, 1].
        """
        picture = read_image(item)
        if isinstance(picture, Image.Image):
            width, height = picture.size
            pixels = np.array(self._resize_pil(picture))
            tensor = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
        else:
            height, width = picture.shape[1:]
            tensor = self._resize_tensor(picture)
        side = min(height, width)
        restored = [height, width] if self.fit == "stretch" else [side, side]
        return tensor.contiguous(), {"size": restored, "source_size": [height, width]}

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """A reconstruction `[3, size, size]` at the size of the part of the original that was encoded, in [0, 1]."""
        size = tuple(meta.get("size", reconstruction.shape[1:]))
        return _resample(reconstruction.clamp(0, 1), *size)

    def _plan(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to resize to, before the centre is cropped out."""
        if self.fit == "stretch":
            return self.size, self.size
        short = min(height, width)
        whole = int if self.fit == "crop" else round
        return (
            (self.size, whole(self.size * width / short)) if height == short else (whole(self.size * height / short), self.size)
        )

    def _resize_pil(self, picture: Image.Image) -> Image.Image:
        if self.fit != "stretch":
            picture = _limit_aspect(picture)
        while self.fit == "adm" and min(picture.size) >= 2 * self.size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        height, width = self._plan(picture.height, picture.width)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        top, left = self._margins(height, width)
        return picture.crop((left, top, left + self.size, top + self.size))

    def _resize_tensor(self, picture: Tensor) -> Tensor:
        while self.fit == "adm" and min(picture.shape[1:]) >= 2 * self.size:
            height, width = picture.shape[1:]
            picture = F.interpolate(picture[None], (height // 2, width // 2), mode="area")[0]
        height, width = self._plan(*picture.shape[1:])
        picture = _resample(picture, height, width)
        top, left = self._margins(height, width)
        return picture[:, top : top + self.size, left : left + self.size]

    def _margins(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns before the centre."""
        above, before = height - self.size, width - self.size
        return (above // 2, before // 2) if self.fit == "adm" else (round(above / 2), round(before / 2))


def read_image(item: Any) -> Image.Image | Tensor:
    """A picture in any of the forms a user may hold: 8-bit ones as an RGB Pillow image, floating-point ones as a tensor.

    EXIF rotation is applied, transparency is laid over white, 16-bit greys are scaled to 8 bits, CMYK and palettes are
    converted, and of an animation the first frame is taken.

    Args:
        item: A path, encoded bytes, a Pillow image, an array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, or a
            tensor `(H, W)`, `(1, H, W)`, `(3, H, W)` or `(4, H, W)`; uint8, uint16, bool, or floating point in [0, 1].

    Returns:
        A Pillow image in mode RGB, or float32 `[3, H, W]`.

    Raises:
        MediaError: If it is none of these, damaged, empty, too large, or holds values outside their range.
    """
    if isinstance(item, Image.Image):
        return _decode_pil(item, "this picture")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(item), f"these {len(item)} bytes")
    if isinstance(item, (str, os.PathLike)):
        path = media_path(item)
        return _open(path, str(path))
    if isinstance(item, np.ndarray):
        return _from_array(item, channels_last=True)
    if isinstance(item, Tensor):
        return _from_array(
            item.detach().cpu().float().numpy() if item.is_floating_point() else item.cpu().numpy(), channels_last=False
        )
    raise MediaError(f"expected a picture: a path, bytes, a PIL image, an array or a tensor, got {type(item).__name__}")


def _open(source: Any, name: str) -> Image.Image | Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as picture:
                return _decode_pil(picture, name)
    except UnidentifiedImageError:
        raise MediaError(f"{name}: not a picture that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(
            f"{name}: too large to decode safely ({error}): raise PIL.Image.MAX_IMAGE_PIXELS to allow it"
        ) from None
    except MediaError:
        raise
    except OSError as error:
        raise MediaError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Pillow's readers answer damaged files with whatever their parsing stumbles over
        raise MediaError(f"{name}: truncated or damaged: {error}") from error


def _decode_pil(picture: Image.Image, name: str) -> Image.Image | Tensor:
    try:
        if getattr(picture, "n_frames", 1) > 1:
            picture.seek(0)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # as above
        raise MediaError(f"{name}: truncated or damaged: {error}") from error
    if not picture.width or not picture.height:
        raise MediaError(f"{name}: has no pixels ({picture.width} x {picture.height})")
    if picture.mode == "F":
        return _from_array(np.asarray(picture), channels_last=True)
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).clip(0, 65535)
        deep = picture.mode != "I" or grey.max() > 255
        return _from_array(grey.astype(np.uint16 if deep else np.uint8), channels_last=True)
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def _from_array(array: np.ndarray, *, channels_last: bool) -> Image.Image | Tensor:
    given = f"{array.dtype} {array.shape}"
    if array.ndim == 3 and not channels_last:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        expected = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)" if channels_last else "(H, W), (1, H, W), (3, H, W) or (4, H, W)"
        raise MediaError(f"expected a picture {expected} with pixels, got {given}: pass a list to encode several")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype == np.uint8:
        bands = {1: array[..., 0], 3: array, 4: array}[array.shape[2]]
        return _decode_pil(Image.fromarray(np.ascontiguousarray(bands)), "this array")
    if not np.issubdtype(array.dtype, np.floating):
        raise MediaError(f"expected a picture of uint8, uint16, bool or floating point, got {given}")
    return _from_floats(torch.from_numpy(np.array(array, dtype=np.float32)).permute(2, 0, 1), given)


def _from_floats(picture: Tensor, given: str) -> Tensor:
    low, high = float(picture.min()), float(picture.max())
    if not (low >= 0 and high <= 1):
        raise MediaError(f"expected a floating-point picture with values in [0, 1], got {given} from {low:.4g} to {high:.4g}")
    if picture.shape[0] == 4:
        alpha = picture[3:]
        picture = picture[:3] * alpha + (1 - alpha)
    return picture.expand(3, -1, -1)


def _limit_aspect(picture: Image.Image) -> Image.Image:
    """Cuts the ends off a strip so extreme that resizing all of it would take gigabytes; the centre is what is kept."""
    width, height = picture.size
    limit = _LONGEST_ASPECT * min(width, height)
    wide, tall = min(width, limit), min(height, limit)
    left, top = (width - wide) // 2, (height - tall) // 2
    return picture if (wide, tall) == (width, height) else picture.crop((left, top, left + wide, top + tall))


def _resample(picture: Tensor, height: int, width: int) -> Tensor:
    if tuple(picture.shape[1:]) == (height, width):
        return picture
    return F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)

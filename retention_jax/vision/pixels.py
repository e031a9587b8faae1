"""From pixels to patches, as the image processors of Qwen-VL make them.

A picture is resized so that its sides are multiples of patch * merge and its area lies within limits, and cut into
patches. Rows of patches are in merge-block order, (frame, block row, block column, row in block, column in block), so
that the patches of one feature are neighbours; inside a row lie (colour, frame, y, x).
"""

import base64
import binascii
import io
import math
import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

Source = str | os.PathLike | Image.Image | np.ndarray  # a path, a data URL, a picture, or an array of pixels
Frames = UInt8[np.ndarray, "frames height width 3"]
_LONGEST = 200  # times the shorter side; beyond, the published processors refuse too


class Limits(NamedTuple):
    """Pixels that a resized picture or clip may have."""

    least: int
    most: int


def open_picture(source: Source) -> UInt8[np.ndarray, "height width 3"]:
    """Red, green and blue of a picture, 0 to 255.

    A picture is turned as its EXIF data say; transparency is dropped, whatever colour lies under it. Arrays are uint8,
    [height, width] or with 1, 3 or 4 colours.

    Raises:
      ValueError: when it cannot be read, or an array has another shape or type.
    """
    if isinstance(source, np.ndarray):
        colours = 1 if source.ndim == 2 else source.shape[-1]
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or colours not in (1, 3, 4):
            raise ValueError(
                f"a picture must be uint8 [height, width] or [height, width, 1, 3 or 4], got {source.dtype} "
                f"{list(source.shape)}"
            )
        pixels = source.reshape(*source.shape[:2], colours)[..., :3]
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    if isinstance(source, Image.Image):
        return _colours(source)
    shown = str(source)
    if shown.startswith("data:"):
        shown = shown[:80]  # the rest is the picture
    try:
        with Image.open(_bytes_of(os.fspath(source))) as picture:
            return _colours(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{shown}: cannot be read as a picture: {error}") from None


def of_data_url(url: str) -> io.BytesIO:
    """The file in a data URL; raises ValueError when it is not valid base64."""
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data URL must be in base64")
    try:
        return io.BytesIO(base64.b64decode(body, validate=True))
    except binascii.Error as error:
        raise ValueError(f"a data URL is not valid base64: {error}") from None


def _bytes_of(source: str | bytes) -> str | io.BytesIO:
    source = os.fsdecode(source)
    if source.startswith("data:"):
        return of_data_url(source)
    if source.startswith(("http://", "https://")):
        raise ValueError("pictures are not downloaded; give a file or a data URL")
    return os.path.expanduser(source.removeprefix("file://"))


def _colours(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def picture_size(height: int, width: int, factor: int, limits: Limits) -> tuple[int, int]:
    """Height and width to resize a picture to: multiples of `factor`, about the same shape, an area within limits.

    Raises:
      ValueError: when one side is more than 200 times the other.
    """
    _check_shape(height, width)
    new = tuple(round(side / factor) * factor for side in (height, width))  # half to even
    return _within(new, height, width, 1, new[0] * new[1], factor, limits)


def clip_size(frames: int, height: int, width: int, temporal: int, factor: int, limits: Limits) -> tuple[int, int]:
    """Height and width to resize the frames of a clip to; the limits are for the whole clip (Qwen3-VL).

    Raises:
      ValueError: as `picture_size` does, and with fewer frames than one patch has.
    """
    if frames < temporal:
        raise ValueError(f"a clip must have at least {temporal} frames, got {frames}")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_shape(height, width)
    new = tuple(round(side / factor) * factor for side in (height, width))
    steps = round(frames / temporal) * temporal
    return _within(new, height, width, frames, steps * new[0] * new[1], factor, limits)


def _within(
    new: tuple[int, ...], height: int, width: int, frames: int, volume: int, factor: int, limits: Limits
) -> tuple[int, int]:
    if volume > limits.most:
        scale = math.sqrt(frames * height * width / limits.most)
        return _at_least_one(height / scale, factor), _at_least_one(width / scale, factor)
    if volume < limits.least:
        scale = math.sqrt(limits.least / (frames * height * width))
        return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return new[0], new[1]


def _at_least_one(side: float, factor: int) -> int:
    return max(factor, math.floor(side / factor) * factor)


def _check_shape(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) / min(height, width) > _LONGEST:
        raise ValueError(
            f"a picture's longer side must be at most {_LONGEST} times the shorter one, got {height} x {width}"
        )


def resize(frames: Frames, height: int, width: int) -> UInt8[np.ndarray, "frames new_height new_width 3"]:
    """Each frame in another size, by Pillow's antialiased bicubic filter."""
    sized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(frame) for frame in sized])


def cut(frames: Frames, patch: int, merge: int, temporal: int) -> tuple[UInt8[np.ndarray, "P size"], tuple[int, ...]]:
    """The patches of resized frames, and how many there are over time, height and width.

    The last frame is repeated until the frames fill their patches: a picture is one frame shown twice.
    """
    frames = np.concatenate([frames, *[frames[-1:]] * (-len(frames) % temporal)])
    grid = len(frames) // temporal, frames.shape[1] // patch, frames.shape[2] // patch
    t, h, w = grid
    blocks = frames.reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), grid


def normalise(
    patches: UInt8[np.ndarray, "P size"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[np.ndarray, "P size"]:
    """Colours from 0 ... 255 to 0 ... 1, less their mean, over their standard deviation."""
    mean_of, std_of = (np.asarray(a, np.float32)[None, :, None] for a in (mean, std))
    by_colour = patches.reshape(len(patches), 3, -1).astype(np.float32) / np.float32(255)
    return ((by_colour - mean_of) / std_of).reshape(patches.shape)

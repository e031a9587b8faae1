"""What a tower reads of some prompts: their patches in one padded array, where each lies, and what it attends to.

A patch attends to its frame, or to its window of it. Both are told by ids, and the patches of each lie near each other:
so a block of queries needs but one range of keys, from `first` on, and no array has a number for each pair of patches
of a large picture or of a clip.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retention_jax.config import VisionConfig
from retention_jax.runtime.arrays import AnyArray
from retention_jax.vision.prompt import Grid, Prompt

BLOCK = 128  # queries that attend at one time; P is a multiple of it


class Segments(NamedTuple):
    """Which patches see each other: those of one id."""

    ids: Int[AnyArray, "B P"]  # -1: padding
    first: Int[AnyArray, "B blocks"]  # where the keys of each block of queries begin


class Sight(NamedTuple):
    """Patches of B prompts, each row's own first, those of one feature as neighbours."""

    pixels: Float[AnyArray, "B P size"]
    place: Int[AnyArray, "B P 2"]  # row and column in the picture
    corners: Int[AnyArray, "B P 4"]  # rows of the table of learned positions around it; 0 without a table
    weights: Float[AnyArray, "B P 4"]  # of the corners; 0 without a table
    frames: Segments
    windows: Segments


class Spans(NamedTuple):
    """How many keys a block of queries needs at most; static."""

    frames: int
    windows: int


def of_prompts(prompts: Sequence[Prompt], vision: VisionConfig, width: int | None = None) -> tuple[Sight, Spans]:
    """What the tower reads of prompts, at least one of which has a picture.

    Rows are padded to `width` patches, a multiple of BLOCK; by default to one of few sizes.
    """
    count = bucket(max(len(prompt.pixels) for prompt in prompts)) if width is None else width
    rows = [_row(prompt, vision, count) for prompt in prompts]
    pixels, place, corners, weights, frames, windows = (np.stack(parts) for parts in zip(*rows, strict=True))
    of_frames, frame_span = _segments(frames)
    of_windows, window_span = _segments(windows)
    return Sight(pixels, place, corners, weights, of_frames, of_windows), Spans(frame_span, window_span)


def bucket(count: int) -> int:
    """A multiple of BLOCK that is at most a quarter, or BLOCK, more: few sizes are few programs to compile."""
    step = max(2 ** (count.bit_length() - 3), BLOCK)
    return -(-count // step) * step


def _row(prompt: Prompt, vision: VisionConfig, count: int) -> tuple[np.ndarray, ...]:
    """The arrays of one row."""
    parts = [_picture(grid, vision) for grid in prompt.grids]
    place, corners, weights, frame, window = (
        np.concatenate([part[i] for part in parts]) if parts else np.zeros((0, *trailing), np.float32)
        for i, trailing in enumerate(((2,), (4,), (4,), (1,), (3,)))
    )
    begins = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])[:, None]
    ids = [_numbered(np.concatenate([begins, part], axis=1)) for part in (frame, window)]
    pad = lambda a, dtype, value=0: np.pad(
        a.astype(dtype), [(0, count - len(a))] + [(0, 0)] * (a.ndim - 1), constant_values=value
    )
    return (
        pad(prompt.pixels, np.float32),
        pad(place, np.int32),
        pad(corners, np.int32),
        pad(weights, np.float32),
        *(pad(part, np.int32, -1) for part in ids),
    )


def _numbered(keys: np.ndarray) -> np.ndarray:
    """A number for each different row."""
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1) if len(keys) else np.zeros(0)


def _picture(grid: Grid, vision: VisionConfig) -> tuple[np.ndarray, ...]:
    """Of each patch of a picture or clip: place, corners and their weights, and what tells its frame and its window."""
    t, h, w = grid
    merge = vision.merge
    shape = (t, h // merge, w // merge, merge, merge)
    frame, block_row, block_column, row, column = (a.reshape(-1) for a in np.indices(shape))
    place = np.stack([block_row * merge + row, block_column * merge + column], axis=1)
    corners, weights = np.zeros((len(place), 4), np.int64), np.zeros((len(place), 4))
    if vision.position_side:
        last = vision.position_side - 1
        at = place * last / np.maximum(np.array([[h, w]]) - 1, 1)  # the picture's corners lie on the table's
        low = np.minimum((place * last) // np.maximum(np.array([[h, w]]) - 1, 1), last)
        high, share = np.minimum(low + 1, last), at - low
        pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
        edge, part = (low, high), (1 - share, share)
        corners = np.stack([edge[a][:, 0] * (last + 1) + edge[b][:, 1] for a, b in pairs], axis=1)
        weights = np.stack([part[a][:, 0] * part[b][:, 1] for a, b in pairs], axis=1)
    side = vision.window // vision.patch if vision.window else max(h, w)
    window = np.stack([frame, *(place // side).T], axis=1)
    return place, corners, weights, frame[:, None], window


def _segments(ids: Int[np.ndarray, "B P"]) -> tuple[Segments, int]:
    """The segments of ids, and the longest range of keys that a block needs."""
    first, ends = np.zeros((len(ids), ids.shape[1] // BLOCK), np.int32), [1]
    for row, begins in zip(ids, first, strict=True):
        real = int((row >= 0).sum())
        if not real:
            continue
        number = row[:real]
        low, high = np.full(number.max() + 1, real), np.zeros(number.max() + 1, np.int64)
        np.minimum.at(low, number, np.arange(real))
        np.maximum.at(high, number, np.arange(real) + 1)
        for block in range(-(-real // BLOCK)):
            of_block = number[block * BLOCK : (block + 1) * BLOCK]
            begins[block] = low[of_block].min()
            ends.append(int(high[of_block].max() - begins[block]))
    return Segments(ids, first), min(bucket(max(ends)), ids.shape[1])

"""Prompts with pictures: placeholders, the positions that RoPE turns by, and which feature stands where.

A prompt's tokens have three positions each (time, height, width; arXiv 2409.12191). Text moves on by one on all three.
A picture that starts at s has time s, height s + row and width s + column, and text goes on behind the larger side. A
clip of Qwen3-VL is a series of pictures; one of Qwen2.5-VL counts its time, and text goes on behind the largest
position. So a token's position is not its index in the sequence, by which the cache counts age: prompts hold the
difference.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

from retention_jax.config import VisionConfig

Grid = tuple[int, int, int]  # patches over time, height and width


class Patches(NamedTuple):
    """A picture or a clip, ready for the tower."""

    pixels: Float32[np.ndarray, "P size"]
    grid: tuple[int, int, int]  # patches over time, height and width
    times: list[float]  # of a clip: seconds of each step of its grid; of a picture none
    step_seconds: float  # of a clip: seconds of one step; of a picture 0

    @property
    def is_clip(self) -> bool:
        return bool(self.times)


class Prompt(NamedTuple):
    """One row to read: tokens, and the pictures and clips among them."""

    tokens: Int32[np.ndarray, " T"]
    shift: Int32[np.ndarray, "3 T"]  # a token's position less its index, over time, height and width
    next_shift: int  # the same for text that follows
    feature: Int32[np.ndarray, " T"]  # which feature stands in for the token; -1: none
    pixels: Float32[np.ndarray, "P size"]  # patches of all pictures and clips
    grids: tuple[Grid, ...]  # of each picture and clip, in the order of their patches


def text_prompt(tokens: Sequence[int], patch_size: int) -> Prompt:
    """A prompt without pictures."""
    ids = np.asarray(tokens, np.int32)
    nothing = np.zeros((0, patch_size), np.float32)
    return Prompt(ids, np.zeros((3, len(ids)), np.int32), 0, np.full(len(ids), -1, np.int32), nothing, ())


def features_of(grid: Grid, vision: VisionConfig) -> int:
    """How many features, and so placeholders, a picture or clip has."""
    return math.prod(grid) // vision.merge**2


def names(text_of: Callable[[int], str | None], vision: VisionConfig) -> tuple[str, str, str, str]:
    """Texts of the image and video placeholders, and of what stands before and after them.

    Raises:
      ValueError: when the tokenizer, whose `text_of` a token is asked, lacks one.
    """
    ids = (vision.image_token, vision.video_token, vision.start_token, vision.end_token)
    image, video, start, end = map(text_of, ids)
    if image is None or video is None or start is None or end is None:
        raise ValueError(f"the tokenizer lacks one of the tokens {', '.join(map(str, ids))} that config.json names")
    return image, video, start, end


def expand(text: str, media: Sequence[Patches], vision: VisionConfig, names: tuple[str, str, str, str]) -> str:
    """A rendered template with one placeholder repeated for each feature, and a clip's times written (Qwen3-VL).

    Args:
      text: has one image or video placeholder for each of `media`, in their order.
      media: pictures and clips.
      vision: of the model.
      names: texts of the image and video placeholders, and of what stands before and after each.

    Raises:
      ValueError: when the text has other placeholders than media.
    """
    image, video, start, end = names
    pieces, rest = [], text
    for i, one in enumerate(media):
        mark, other = (video, image) if one.is_clip else (image, video)
        at, before = rest.find(mark), rest.find(other)
        if at < 0 or 0 <= before < at:
            raise ValueError(f"the chat template does not write {mark} for picture or clip {i}, in its place")
        if one.is_clip and vision.kind == "qwen3_vl":
            whole = start + mark + end
            if not rest[at - len(start) :].startswith(whole):
                raise ValueError(f"the chat template does not write {whole} for clip {i}")
            t, h, w = one.grid
            frame = start + mark * features_of((1, h, w), vision) + end
            pieces.append(rest[: at - len(start)] + "".join(f"<{time:.1f} seconds>{frame}" for time in one.times))
            rest = rest[at + len(mark) + len(end) :]
        else:
            pieces.append(rest[:at] + mark * features_of(one.grid, vision))
            rest = rest[at + len(mark) :]
    if more := [mark for mark in (image, video) if mark in rest]:
        raise ValueError(f"the text has {more[0]} without a picture or clip for it")
    return "".join(pieces) + rest


def assemble(tokens: Sequence[int] | Int[np.ndarray, " T"], media: Sequence[Patches], vision: VisionConfig) -> Prompt:
    """The prompt of tokens whose placeholders stand for media, in the order in which they come.

    Raises:
      ValueError: when a kind's placeholders are not as many as its features (both numbers), or they are not together.
    """
    order = [i for clip in (False, True) for i, one in enumerate(media) if one.is_clip == clip]
    return of_pixels(
        np.asarray(tokens, np.int32),
        vision,
        np.concatenate([media[i].pixels for i in order]) if order else np.zeros((0, vision.patch_size), np.float32),
        [one.grid for one in media if not one.is_clip],
        [one.grid for one in media if one.is_clip],
        [one.step_seconds for one in media if one.is_clip],
    )


def of_pixels(
    tokens: Int32[np.ndarray, " T"],
    vision: VisionConfig,
    pixels: Float32[np.ndarray, "P size"],
    pictures: Sequence[Grid],
    clips: Sequence[Grid],
    step_seconds: Sequence[float],
) -> Prompt:
    """A prompt whose pictures and clips are patches already, pictures first.

    Args:
      tokens: with a placeholder for each feature.
      vision: of the model.
      pixels: patches.
      pictures: grids of the pictures.
      clips: grids of the clips.
      step_seconds: seconds of one step of each clip's grid, which Qwen2.5-VL's positions count; () for Qwen3-VL.

    Raises:
      ValueError: as `assemble` does.
    """
    shift, following, feature = positions(tokens, vision, pictures, clips, step_seconds)
    return Prompt(tokens, shift, following, feature, pixels, (*pictures, *clips))


def positions(
    tokens: Int32[np.ndarray, " T"],
    vision: VisionConfig,
    pictures: Sequence[Grid],
    clips: Sequence[Grid],
    step_seconds: Sequence[float] = (),
) -> tuple[Int32[np.ndarray, "3 T"], int, Int32[np.ndarray, " T"]]:
    """`shift`, `next_shift` and `feature` of a `Prompt`; takes and raises what `of_pixels` does."""
    by_steps = vision.kind == "qwen2_5_vl"
    _check_counts(tokens, vision, pictures, clips)
    if by_steps and len(step_seconds) != len(clips):
        raise ValueError(f"each of the {len(clips)} clips needs its seconds per step, got {len(step_seconds)}")
    seconds = list(step_seconds) if by_steps else [0.0] * len(clips)
    first = sum(features_of(grid, vision) for grid in pictures)
    # What comes next of each kind: grid, seconds of a step, first feature. Frames are pictures in Qwen3-VL.
    runs = {vision.image_token: [], vision.video_token: []}
    at = 0
    for grid in pictures:
        runs[vision.image_token].append((grid, 0.0, at))
        at += features_of(grid, vision)
    at = first
    for grid, step in zip(clips, seconds, strict=True):
        for part in [grid] if by_steps else [(1, *grid[1:])] * grid[0]:
            runs[vision.video_token].append((part, step, at))
            at += features_of(part, vision)
    found, feature = np.zeros((3, len(tokens)), np.int64), np.full(len(tokens), -1, np.int32)
    marks = np.flatnonzero(np.isin(tokens, list(runs)))
    index, following = 0, 0  # the next token, and the position of text there
    while index < len(tokens):
        ahead = marks[np.searchsorted(marks, index) :]
        text_end = int(ahead[0]) if len(ahead) else len(tokens)
        found[:, index:text_end] = following + np.arange(text_end - index)
        following, index = following + text_end - index, text_end
        if index == len(tokens):
            break
        mark = int(tokens[index])
        (t, h, w), step, begin = runs[mark].pop(0)
        h, w = h // vision.merge, w // vision.merge
        end = index + t * h * w
        if np.any(tokens[index:end] != mark) or end > len(tokens):
            raise ValueError(f"the {t * h * w} placeholders of a picture or clip must stand together, at token {index}")
        ticks = [int(k * vision.ticks_per_second * step) for k in range(t)]
        axes = np.meshgrid(ticks, np.arange(h), np.arange(w), indexing="ij")
        found[:, index:end] = following + np.stack([axis.reshape(-1) for axis in axes])
        feature[index:end] = begin + np.arange(end - index)
        following, index = following + max(ticks[-1] + 1, h, w), end
    shift = found - np.arange(len(tokens))[None]
    return shift.astype(np.int32), following - len(tokens), feature


def _check_counts(
    tokens: Int32[np.ndarray, " T"], vision: VisionConfig, pictures: Sequence[Grid], clips: Sequence[Grid]
) -> None:
    problems = []
    for name, token, grids in (("image", vision.image_token, pictures), ("video", vision.video_token, clips)):
        uneven = [g for g in grids if min(g) < 1 or g[1] % vision.merge or g[2] % vision.merge]
        problems += [f"a grid must be positive, its sides multiples of {vision.merge}, got {g}" for g in uneven]
        count, wanted = int((tokens == token).sum()), sum(features_of(grid, vision) for grid in grids)
        if count != wanted and not uneven:
            problems.append(f"there are {count} {name} placeholders, but {wanted} features of {len(grids)} {name}s")
    if problems:
        raise ValueError("; ".join(problems))

"""What a checkpoint's folder says about pictures and clips, and patches made by it.

preprocessor_config.json          limits of pictures in pixels, means and deviations of colours
video_preprocessor_config.json    limits of clips, frames a second
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

from retention_jax.config import VisionConfig
from retention_jax.vision import clips, pixels
from retention_jax.vision.clips import Clip, Sampling
from retention_jax.vision.pixels import Limits, Source
from retention_jax.vision.prompt import Patches

# Where a Qwen2.5-VL folder says nothing of clips: 128 to 768 features a frame and step, 22,118 all together.
_FRAME_FEATURES, _CLIP_FEATURES, _CLIP_SHARE = (128, 768), 24_576, 0.9


class Processor(NamedTuple):
    """How pictures and clips become patches."""

    vision: VisionConfig
    pictures: Limits
    clips: Limits | None  # of a whole clip (qwen3_vl), of one frame (qwen2_5_vl; None: by the number of frames)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sampling: Sampling


def read(folder: str | os.PathLike, vision: VisionConfig) -> Processor:
    """How a checkpoint's folder wants pictures to be prepared.

    Raises:
      ValueError: when preprocessor_config.json is missing or damaged, a file lacks limits, or a file asks for anything
        that is not done here (all named).
    """
    folder, problems = pathlib.Path(folder), []
    still = _checked(folder / "preprocessor_config.json", vision, problems)
    moving = folder / "video_preprocessor_config.json"
    film = _checked(moving, vision, problems) if moving.is_file() else {}
    pictures = _limits(folder / "preprocessor_config.json", still, problems)
    of_clips = _limits(moving, film, problems) if film else None
    if of_clips is None and vision.kind == "qwen3_vl" and not problems:
        problems.append(f"{moving}: no such file; it holds the limits of clips")
    if problems:
        raise ValueError("; ".join(problems))
    even = vision.kind == "qwen2_5_vl"
    asked = {"per_second": film.get("fps"), "least": film.get("min_frames"), "most": film.get("max_frames")}
    sampling = Sampling(even=even)._replace(**{name: value for name, value in asked.items() if value is not None})
    mean, std = (tuple(still.get(name, (0.5,) * 3)) for name in ("image_mean", "image_std"))
    return Processor(vision, pictures, of_clips, mean, std, sampling)


def _checked(path: pathlib.Path, vision: VisionConfig, problems: list[str]) -> dict[str, Any]:
    """The object in a file; adds to `problems`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path}: no such file; it says how pictures are prepared")
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not valid JSON: {error}")
        return {}
    wanted = {
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.temporal,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
    }
    problems += [
        f"{path}: {name} must be {value}, got {values[name]!r}"
        for name, value in wanted.items()
        if values.get(name, value) != value
    ]
    if abs(values.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        problems.append(f"{path}: rescale_factor must be 1/255, got {values['rescale_factor']!r}")
    return values


def _limits(path: pathlib.Path, values: dict[str, Any], problems: list[str]) -> Limits:
    """The least and most pixels in a file; adds to `problems`. Sizes named "edge" are areas as well."""
    size = values.get("size") or {}
    least = values.get("min_pixels", size.get("shortest_edge"))
    most = values.get("max_pixels", size.get("longest_edge"))
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        needed = "must have min_pixels and max_pixels, or size with both edges"
        problems += [f"{path}: {needed}, got {least} and {most}"] * bool(values)
        return Limits(1, 1)
    return Limits(least, most)


def picture(processor: Processor, source: Source) -> Patches:
    """A picture's patches; raises ValueError as `pixels.open_picture` and `pixels.picture_size` do."""
    frame, vision = pixels.open_picture(source), processor.vision
    size = pixels.picture_size(frame.shape[0], frame.shape[1], vision.factor, processor.pictures)
    return _patches(processor, pixels.resize(frame[None], *size), [], 0.0)


def clip(processor: Processor, source: Clip) -> Patches:
    """A clip's patches; raises ValueError as `pixels.clip_size` does."""
    frames, vision = source.frames, processor.vision
    count, height, width = frames.shape[:3]
    if vision.kind == "qwen3_vl":
        assert processor.clips is not None  # `read` has seen to it
        size = pixels.clip_size(count, height, width, vision.temporal, vision.factor, processor.clips)
    else:
        limits = processor.clips or _by_count(count, vision)
        size = pixels.picture_size(height, width, vision.factor, limits)
    n = vision.temporal
    padded = source.times + source.times[-1:] * (-count % n)
    means = [(padded[i] + padded[i + n - 1]) / 2 for i in range(0, len(padded), n)]
    return _patches(processor, pixels.resize(frames, *size), means, n * source.frame_seconds)


def _by_count(frames: int, vision: VisionConfig) -> Limits:
    unit = vision.factor**2
    least, most = _FRAME_FEATURES[0] * unit, _FRAME_FEATURES[1] * unit
    share = int(_CLIP_FEATURES * _CLIP_SHARE * unit / frames * vision.temporal)
    return Limits(least, max(min(most, share), int(least * 1.05)))


def _patches(processor: Processor, frames: pixels.Frames, times: list[float], step: float) -> Patches:
    vision = processor.vision
    rows, (t, h, w) = pixels.cut(frames, vision.patch, vision.merge, vision.temporal)
    return Patches(pixels.normalise(rows, processor.mean, processor.std), (t, h, w), times, step)


def film(processor: Processor, path: str | os.PathLike) -> Patches:
    """Patches of a clip on disk; raises as `clips.read` and `clip` do."""
    return clip(processor, clips.read(path, processor.sampling))

"""Clips: frames of a film with their times, from a folder, from a file, or as they are given."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from retention_jax.vision.pixels import Frames, Source, open_picture

INDEX = "frames.json"  # in a folder of frames


class Sampling(NamedTuple):
    """Which frames of a film are looked at."""

    per_second: float = 2.0
    least: int = 4
    most: int = 768
    even: bool = False  # an even number of them (Qwen2.5-VL)


class Clip(NamedTuple):
    """Frames that are looked at."""

    frames: Frames
    times: list[float]  # seconds from the film's start to each frame
    frame_seconds: float  # from one frame to the next, on average


def frames_wanted(total: int, per_second: float, sampling: Sampling) -> list[int]:
    """Indices of the frames to look at in a film of `total` frames, spread evenly from the first to the last."""
    if sampling.even:
        count = min(max(total / per_second * sampling.per_second, sampling.least), sampling.most, total)
        count = int(count // 2 * 2)
    else:
        count = min(max(int(total / per_second * sampling.per_second), sampling.least), sampling.most, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def of_pictures(pictures: Sequence[Source], times: Sequence[float], duration: float | None = None) -> Clip:
    """A clip of single pictures of one size.

    Args:
      pictures: its frames.
      times: seconds from the film's start to each.
      duration: of the whole film that they are spread over; None where they stand for themselves.

    Raises:
      ValueError: on fewer than two frames, times that do not grow or are not one for each, frames of several sizes, and
        as `open_picture` does.
    """
    if len(pictures) < 2:
        raise ValueError(f"a clip must have at least 2 frames, got {len(pictures)}")
    if len(times) != len(pictures):
        raise ValueError(f"a clip must have a time for each of its {len(pictures)} frames, got {len(times)}")
    if any(not isinstance(t, int | float) or t < 0 for t in times) or any(np.diff(times) <= 0):
        raise ValueError(f"a clip's times must be seconds that grow from frame to frame, got {list(times)}")
    frames = [open_picture(picture) for picture in pictures]
    if len(sizes := {frame.shape[:2] for frame in frames}) > 1:
        told = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise ValueError(f"a clip's frames must have one size, got {told}")
    spacing = (times[-1] - times[0]) / (len(times) - 1) if duration is None else duration / len(times)
    return Clip(np.stack(frames), [float(t) for t in times], spacing)


def read(path: str | os.PathLike, sampling: Sampling) -> Clip:
    """A clip from a folder of frames with `frames.json`, or from a film.

    The folder's file holds `frames`, a list of objects with `file` and either `time`, in seconds, or `index`, which
    `fps` turns into one; perhaps `total_frames` of the film that they were taken from. All its frames are used. Of a
    film, `sampling` chooses them; that needs PyAV, of the extra retention_jax[video].

    Raises:
      ValueError: when there is no such file, it is damaged, or as `of_pictures` does.
      ImportError: for a film when PyAV is not installed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file; a clip is a film or a folder with {INDEX}")
    try:
        if path.is_dir() or path.suffix == ".json":
            return _of_folder(path / INDEX if path.is_dir() else path)
        return _of_film(path, sampling)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of_folder(index: pathlib.Path) -> Clip:
    if not index.is_file():
        raise ValueError(f"a folder of frames must have {INDEX}, with the time of each")
    try:
        told: Any = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    frames = told.get("frames") if isinstance(told, dict) else None
    if not isinstance(frames, list) or not all(isinstance(f, dict) and isinstance(f.get("file"), str) for f in frames):
        raise ValueError("must be an object with 'frames', a list of objects with 'file'")
    per_second, total = told.get("fps"), told.get("total_frames")
    times = [f.get("time", f["index"] / per_second if per_second and "index" in f else None) for f in frames]
    if missing := [f["file"] for f, time in zip(frames, times, strict=True) if time is None]:
        raise ValueError(f"frames need a 'time', or an 'index' with 'fps' for all: {', '.join(missing[:5])} have none")
    duration = total / per_second if per_second and total else None
    return of_pictures([index.parent / f["file"] for f in frames], times, duration)


def _of_film(path: pathlib.Path, sampling: Sampling) -> Clip:
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        message = f"{path}: films need PyAV, of the extra retention_jax[video]; a folder of frames does not"
        raise ImportError(message) from error
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("has no pictures")
            stream = film.streams.video[0]
            stream.thread_type = "AUTO"
            per_second = float(stream.average_rate or 0)
            total = stream.frames or sum(1 for _ in film.decode(stream))
        if not (per_second and total):
            raise ValueError("does not tell how many frames it has, or how many a second")
        wanted = frames_wanted(total, per_second, sampling)
        frames = _decoded(av, path, wanted)
    except FFmpegError as error:
        raise ValueError(f"cannot be read as a film: {error}") from None
    times = [i / per_second for i in wanted[: len(frames)]]
    return of_pictures(frames, times, duration=total / per_second)


def _decoded(av: Any, path: pathlib.Path, wanted: list[int]) -> list[UInt8[np.ndarray, "height width 3"]]:
    """The frames at these ascending indices; fewer where the film ends before its header says."""
    found: list[np.ndarray] = []
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        stream.thread_type = "AUTO"
        for i, frame in enumerate(film.decode(stream)):
            if len(found) == len(wanted):
                break
            if i == wanted[len(found)]:
                found.append(frame.to_ndarray(format="rgb24"))
    return found

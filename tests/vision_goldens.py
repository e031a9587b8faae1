"""The public implementations' outputs on tiny vision-language models, in ../shared/golden_vl."""

import functools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from retention_jax.config import VisionConfig
from retention_jax.vision import clips, processor, prompt
from retention_jax.vision.pixels import Limits

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden_vl"
needs_goldens = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden_vl")
MODELS = ("q3", "q25")
CASES = ("one", "two", "clip", "mixed", "turns", "text")


@functools.cache
def recorded(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return dict(arrays)


def texts(name: str) -> dict[str, dict[str, str]]:
    return json.loads((GOLDEN / f"{name}_texts.json").read_text())


IDS: Any = dict(image_token=386, video_token=387, start_token=383, end_token=384)
SIZES: Any = dict(depth=4, width=32, num_heads=2, mlp_width=56, out_width=64)
VISION = {
    "q3": VisionConfig("qwen3_vl", **SIZES, patch=16, **IDS, position_side=8, deepstack=(0, 1, 3)),
    "q25": VisionConfig("qwen2_5_vl", **SIZES, patch=14, **IDS, window=56, full_blocks=(1, 3), ticks_per_second=2.0),
}
NAMES = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def processor_of(name: str) -> processor.Processor:
    found = processor.read(GOLDEN / f"{name}_model", VISION[name])
    return found if name == "q3" else found._replace(clips=Limits(3136, 6272))


def still(name: str, i: int) -> prompt.Patches:
    """Picture i of the goldens, as it is recorded there."""
    stored = recorded(f"{name}_pixels")
    t, h, w = stored["images/grid"][i].tolist()
    first = stored["images/grid"][:i].prod(axis=1).sum()
    return prompt.Patches(stored["images/pixel_values"][first : first + t * h * w], (t, h, w), [], 0.0)


def media_of(name: str, case: str) -> list[prompt.Patches]:
    """Pictures and clips of a case, in their order in the text: clips come first where there are both."""
    cases = recorded(f"{name}_prompts")
    films = [processor.clip(processor_of(name), film(name)) for _ in cases[f"{case}/videos"]]
    return films + [still(name, i) for i in cases[f"{case}/images"].tolist()]


def film(name: str) -> clips.Clip:
    stored = recorded(f"{name}_pixels")
    times = (stored["video/indices"] / stored["video/fps"]).tolist()
    return clips.of_pictures([*stored["video/frames"]], times, duration=325 / 25)

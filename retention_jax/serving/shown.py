"""Pictures of a request: what snapshots know them by, and what the model reads in their places.

One picture at a time goes through the tower, as one chunk of a prompt goes through the decoder, so nobody waits for all
of them. Widths are few and compiled before the first request. What a picture gives lies in host memory until its chunk
is read.
"""

import hashlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from retention_jax.config import ModelConfig, VisionConfig
from retention_jax.models import vision as towers
from retention_jax.models.inputs import Visual
from retention_jax.models.vision import Vision
from retention_jax.vision import prompt as prompts
from retention_jax.vision import sight
from retention_jax.vision.prompt import Grid, Prompt
from retention_jax.vision.sight import Spans


class Shown(NamedTuple):
    """A prompt with pictures."""

    prompt: Prompt
    key: tuple[int, ...]  # its tokens; in place of a picture's, negative numbers that its pixels and its shape give
    ends: tuple[int, ...]  # features of the first picture, of the first two, and so on


class Seen(NamedTuple):
    """What the tower makes of a picture, on the host."""

    features: Float[np.ndarray, "F D"]
    deepstack: Float[np.ndarray, "stacked F D"]


class View(NamedTuple):
    """A request's pictures while its prompt is read."""

    shown: Shown
    base: int  # the buffer's shift where reading began
    seen: tuple[Seen | None, ...]  # of the first pictures; None where a snapshot holds a picture whole

    @property
    def is_whole(self) -> bool:
        """Whether every picture was looked at."""
        return len(self.seen) == len(self.shown.prompt.grids)


def of(prompt: Prompt, vision: VisionConfig) -> Shown:
    """A prompt with pictures, no clips, as snapshots know it: the same tokens with other pixels are another prompt."""
    key, first, numbers = prompt.tokens.astype(np.int64), 0, []
    features = [prompts.features_of(grid, vision) for grid in prompt.grids]
    for grid, count in zip(prompt.grids, features, strict=True):
        pixels = prompt.pixels[first : first + math.prod(grid)]
        first += len(pixels)
        drawn = hashlib.shake_256(hashlib.sha256(repr(grid).encode() + pixels.tobytes()).digest())
        numbers.append(np.frombuffer(drawn.digest(8 * count), "<i8") | np.iinfo(np.int64).min)
    is_picture = prompt.feature >= 0
    key[is_picture] = np.concatenate(numbers)[prompt.feature[is_picture]]
    return Shown(prompt, tuple(key.tolist()), tuple(np.cumsum(features).tolist()))


def problems(shown: Shown, model: ModelConfig, most: int) -> list[str]:
    """What is wrong with a request's pictures for a model and the most features that one may have, in words."""
    if model.vision is None or not most:
        return ["the prompt has pictures, which are not taken here"]
    over = [prompts.features_of(grid, model.vision) for grid in shown.prompt.grids]
    return [f"a picture has {count} features, at most {most}" for count in over if count > most]


def widths(vision: VisionConfig, most: int) -> list[int]:
    """Patches that one program of the tower reads, for pictures of at most so many features."""
    found = [sight.BLOCK]
    while found[-1] < most * vision.merge**2:
        found.append(2 * found[-1])
    return found


def begin(shown: Shown, at: int, base: int) -> View:
    """Before reading, behind `at` tokens that a snapshot with a shift of `base` holds."""
    left = shown.prompt.feature[at:]
    left = left[left >= 0]
    held = len(shown.ends) if not len(left) else int(np.searchsorted(shown.ends, left[0], side="right"))
    return View(shown, base, (None,) * held)


def look(tower: Vision, view: View, widths: list[int]) -> View:
    """Looks at the next picture."""
    prompt, number = view.shown.prompt, len(view.seen)
    sizes = [math.prod(grid) for grid in prompt.grids]
    first, count = sum(sizes[:number]), sizes[number]
    width = next(width for width in widths if width >= count)
    seen = _see(tower, prompt.pixels[first : first + count], prompt.grids[number], width)
    return view._replace(seen=(*view.seen, seen))


def warm_up(tower: Vision, widths: list[int]) -> None:
    """Runs the program of every width once."""
    vision = tower.config
    for width in widths:
        grid = 1, vision.merge, width // vision.merge
        _see(tower, np.zeros((width, vision.patch_size), np.float32), grid, width)


def _see(tower: Vision, pixels: Float[np.ndarray, "P size"], grid: Grid, width: int) -> Seen:
    alone = prompts.text_prompt((), tower.config.patch_size)._replace(pixels=pixels, grids=(grid,))
    patches, _ = sight.of_prompts([alone], tower.config, width)
    features, deepstack = jax.device_get(towers.see(tower, patches, Spans(width, width)))
    real = prompts.features_of(grid, tower.config)
    return Seen(features[0, :real], deepstack[:, 0, :real])


def nothing(model: ModelConfig, width: int) -> Visual:
    """What stands beside so many tokens of a text."""
    assert model.vision is not None
    dtype, D = jnp.dtype(model.dtype), model.vision.out_width
    return Visual(
        shift=np.zeros((3, 1, width), np.int32),
        next_shift=np.zeros(1, np.int32),
        feature=np.full((1, width), -1, np.int32),
        features=np.zeros((1, width, D), dtype),
        deepstack=np.zeros((len(model.vision.deepstack), 1, width, D), dtype),
    )


def visual(model: ModelConfig, view: View, at: int, count: int, width: int) -> Visual:
    """What stands beside `count` tokens of the prompt from `at` on; a feature lies where its token does."""
    prompt, out = view.shown.prompt, nothing(model, width)
    part = prompt.feature[at : at + count]
    for first, end, seen in zip((0, *view.shown.ends), view.shown.ends, view.seen, strict=False):
        here = np.flatnonzero((part >= first) & (part < end))
        if len(here):
            assert seen is not None  # `begin` leaves out only what a snapshot holds
            np.asarray(out.feature)[0, here] = here
            np.asarray(out.features)[0, here] = seen.features[part[here] - first]
            np.asarray(out.deepstack)[:, 0, here] = seen.deepstack[:, part[here] - first]
    np.asarray(out.shift)[:, 0, :count] = prompt.shift[:, at : at + count] - view.base
    is_last = at + count == len(prompt.tokens)
    return out._replace(next_shift=np.full(1, (prompt.next_shift - view.base) * is_last, np.int32))

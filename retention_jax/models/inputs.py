"""What a model reads: tokens, and the pictures among them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax.models import vision as towers
from retention_jax.models.vision import Vision
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray
from retention_jax.vision import sight
from retention_jax.vision.prompt import Prompt, text_prompt

Row = Sequence[int] | Prompt  # one prompt: token ids, or with pictures


class Visual(NamedTuple):
    """What stands beside tokens where pictures are among them."""

    # RoPE's positions of each token, time, height and width, less what text in its place would have.
    shift: Int[AnyArray, "3 B T"]
    next_shift: Int[AnyArray, " B"]  # the same for text that follows; 0 where more of the prompt does
    feature: Int[AnyArray, "B T"]  # which of the row's features stands in for a token; -1: none
    features: Float[AnyArray, "B F D"]
    deepstack: Float[AnyArray, "stacked B F D"]  # added to hidden states behind the first layers


class Inputs(NamedTuple):
    """New tokens of B rows, real ones first in each row.

    Everything that reads tokens on top of a buffer takes this one value.
    """

    tokens: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]  # which tokens are real; the others are padding
    visual: Visual | None = None  # None: text alone


def lengths(rows: Sequence[Row]) -> list[int]:
    """Tokens of each row."""
    return [len(ids_of(row)) for row in rows]


def ids_of(row: Row) -> Sequence[int] | np.ndarray:
    """A row's token ids."""
    return row.tokens if isinstance(row, Prompt) else row


def of_rows(rows: Sequence[Row], width: int, tower: Vision | None) -> Inputs:
    """Rows padded to `width` tokens; their pictures go through the tower, together.

    Raises:
      ValueError: when a row has pictures and there is no tower.
    """
    valid = np.arange(width)[None] < np.asarray(lengths(rows))[:, None]
    tokens = padded([ids_of(row) for row in rows], width)
    if not any(isinstance(row, Prompt) and row.grids for row in rows):
        return Inputs(tokens, valid)
    if tower is None:
        raise ValueError("the prompt has pictures, but the model has no vision tower")
    prompts = [row if isinstance(row, Prompt) else text_prompt(row, tower.config.patch_size) for row in rows]
    pad = lambda name, value: np.stack(
        [
            np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])], constant_values=value)
            for a in (getattr(prompt, name) for prompt in prompts)
        ],
        axis=-2,
    )
    seen, spans = sight.of_prompts(prompts, tower.config)
    features, deepstack = towers.see(tower, seen, spans)
    next_shift = np.asarray([prompt.next_shift for prompt in prompts], np.int32)
    return Inputs(tokens, valid, Visual(pad("shift", 0), next_shift, pad("feature", -1), features, deepstack))


def padded(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> Int[np.ndarray, "B width"]:
    """Token ids of all rows in one array, zeros behind each row's own."""
    tokens = np.zeros((len(rows), width), np.int32)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return tokens


def chunk_of(whole: Inputs, start: int, size: int) -> Inputs:
    """Tokens `start` up to `start + size` of padded rows, with padding where the rows or the array end."""

    def cut(a: AnyArray, value: int | bool = 0) -> np.ndarray:
        part = np.asarray(a)[..., start : start + size]
        return np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, size - part.shape[-1])], constant_values=value)

    visual = whole.visual
    if visual is not None:
        is_last = not np.asarray(whole.valid)[:, start + size :].any()
        visual = visual._replace(
            shift=cut(visual.shift),
            next_shift=np.asarray(visual.next_shift) * is_last,
            feature=cut(visual.feature, -1),
        )
    return Inputs(cut(whole.tokens).astype(np.int32), cut(whole.valid, False), visual)


def embed(embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], visual: Visual | None) -> Float[Array, "B T D"]:
    """Each token's embedding, or the feature that stands in for it."""
    x = sharding.constrain(embedding[tokens], "embedded")
    if visual is None:
        return x
    feature = jnp.asarray(visual.feature)
    return jnp.where(feature[..., None] >= 0, _rows_at(visual.features, feature), x)


def add_deepstack(
    x: Float[Array, "B T D"], layer: Int[Array, ""] | None, visual: Visual | None
) -> Float[Array, "B T D"]:
    """The hidden states behind a layer, with what DeepStack adds to them."""
    if visual is None or layer is None or not visual.deepstack.shape[0]:
        return x
    feature, stacked = jnp.asarray(visual.feature), jnp.asarray(visual.deepstack)

    def add(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        of_layer = jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
        return x + jnp.where(feature[..., None] >= 0, _rows_at(of_layer, feature), 0)

    return jax.lax.cond(layer < stacked.shape[0], add, lambda x: x, x)


def _rows_at(features: Float[AnyArray, "B F D"], feature: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    features = sharding.constrain(jnp.asarray(features), "patches")
    return jnp.take_along_axis(features, jnp.maximum(feature, 0)[..., None], axis=1)

"""The next token: greedy, or drawn from a tempered distribution cut down by top-k, top-p and min-p, in that order.

Every setting is an array, so that another value does not compile anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How tokens are drawn; the values that switch a filter off are its neutral ones."""

    temperature: Float[Array, ""]  # 0 is greedy
    top_k: Int[Array, ""]  # keep so many of the likeliest tokens, and ties with the last; 0 keeps all
    top_p: Float[Array, ""]  # keep the fewest likeliest tokens of at least this probability together (arXiv 1904.09751)
    min_p: Float[Array, ""]  # keep tokens of at least this share of the likeliest one's probability (arXiv 2407.01082)


def settings(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampling:
    """Checked settings.

    Raises:
      ValueError: naming every one that is out of its range.
    """
    problems = [f"temperature must be at least 0, got {temperature}"] * (not temperature >= 0)
    problems += [f"top_k must be at least 0 (0 keeps all tokens), got {top_k}"] * (top_k < 0)
    problems += [f"top_p must be in (0, 1], got {top_p}"] * (not 0 < top_p <= 1)
    problems += [f"min_p must be in [0, 1], got {min_p}"] * (not 0 <= min_p <= 1)
    if problems:
        raise ValueError("; ".join(problems))
    return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))


def keep(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered logits with -inf for the tokens that top-k, top-p and min-p leave out; the likeliest one always stays.

    Of equally likely tokens at the edge of top-p all stay.
    """
    logits = logits / jnp.maximum(sampling.temperature, 1e-6)
    everything = lambda logits, _: jnp.full_like(logits[:, :1], -jnp.inf)
    cut = (sampling.top_k > 0) | (sampling.top_p < 1)  # else there is nothing to sort for
    least = jax.lax.cond(cut, _least_of_top, everything, logits, sampling)
    # min_p * the largest probability, as logarithms: the normaliser cancels.
    least = jnp.maximum(least, jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p))
    return jnp.where(logits >= least, logits, -jnp.inf)


def _least_of_top(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B 1"]:
    """The lowest logit that top-k and then top-p keep."""
    V = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V) - 1
    of_k = jax.lax.dynamic_slice_in_dim(ordered, last, 1, axis=1)
    probs = jax.nn.softmax(jnp.where(ordered >= of_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of all likelier tokens
    # Without top-p the sum may still round up to 1; there top-k alone decides.
    kept = jnp.where(sampling.top_p < 1, jnp.sum(before < sampling.top_p, axis=-1, keepdims=True), V)
    of_p = jnp.take_along_axis(ordered, jnp.clip(kept, 1, V) - 1, axis=-1)
    return jnp.maximum(of_k, of_p)


def sample(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    row_ids: Int[Array, " B"],
    step: Int[Array, ""],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a row. A row's draw depends on the key, its id and the step, not on the other rows."""

    def draw(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(key, r), step))(row_ids)
        return jax.vmap(jax.random.categorical)(keys, keep(logits, sampling)).astype(jnp.int32)

    greedy = lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(sampling.temperature > 0, draw, greedy, logits)

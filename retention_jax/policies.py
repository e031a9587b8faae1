"""Eviction scores: what stays is what scores highest. One short function for each policy.

A score may depend only on the entry (log_beta, pos, head), on how many tokens were seen, and on the configuration, so
that the order is the same on every device and for every way of reading the prompt.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from retention_jax.config import CacheConfig

STREAMING_SINKS = 4  # first tokens that StreamingLLM keeps (arXiv 2309.17453, section 3.2)


def retention(
    log_beta: Float[Array, "B E"], pos: Int[Array, "B E"], seen: Int[Array, " B"], horizon: int
) -> Float[Array, "B E"]:
    """Log of how much an entry is still worth, age * log_beta, with age = seen + 1 - pos (arXiv 2605.09649).

    With a horizon n > 1, the log of the expected use over the next n steps, sum_{s=1..n} beta^(age + s):
    (age + 1) log_beta + log((1 - beta^n) / (1 - beta)), whose last term tends to log n as beta tends to 1.
    """
    age = (seen[:, None] + 1 - pos).astype(jnp.float32)
    if horizon == 1:
        return age * log_beta
    tiny = jnp.finfo(jnp.float32).tiny
    ratio = jnp.where(log_beta > -tiny, float(horizon), jnp.expm1(horizon * log_beta) / jnp.expm1(log_beta))
    return (age + 1) * log_beta + jnp.log(ratio)


def streaming(pos: Int[Array, "B E"]) -> Float[Array, "B E"]:
    """Attention sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453)."""
    return jnp.where(pos < STREAMING_SINKS, jnp.finfo(jnp.float32).max, pos.astype(jnp.float32))


def random(pos: Int[Array, "B E"], head: Int[Array, "B E"], seed: int) -> Float[Array, "B E"]:
    """Uniform in [0, 1), drawn once for each entry from a hash of seed, position and head: the same in every row."""
    x = pos.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ head.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    x = x ^ jnp.uint32((seed * 0xC2B2AE3D) % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


def score(
    cache: CacheConfig,
    log_beta: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    seen: Int[Array, " B"],
) -> Float[Array, "B E"]:
    """The score of every entry under the configured policy; `head` counts layer * K + key/value head."""
    match cache.policy:
        case "retention":
            return retention(log_beta, pos, seen, cache.horizon)
        case "streaming":
            return streaming(pos)
        case "random":
            return random(pos, head, cache.seed)

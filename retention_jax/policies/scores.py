"""The formulas of eviction scores. What stays is what scores highest; `table.py` says which policy uses which formula.

Scores of single entries depend only on the entry and on how many tokens were seen, so that the order is the same on
every device and for every way of reading the prompt. The others see all keys of a head and the queries since the last
eviction.

The latter were published for one eviction at the end of a prompt, or one after every token. Here each runs at every
eviction, on what the cache still holds by then. Facts are from the papers and from NVIDIA/kvpress. `E` are the entries
of a head, oldest first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


def key_norm(k: Float[Array, "B K E H"]) -> Float[Array, "B K E"]:
    """Minus the key's length: short keys get much attention (Devoto et al., arXiv 2406.11430)."""
    return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1)


def key_diff(k: Float[Array, "B K E H"], live: Bool[Array, "B K E"]) -> Float[Array, "B K E"]:
    """Minus the cosine between a key and the mean of all normed keys of its head (KeyDiff, arXiv 2504.15364)."""
    k = jnp.where(live[..., None], k.astype(jnp.float32), 0)
    unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
    mean = unit.sum(axis=2, keepdims=True)
    return -(unit * mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)).sum(axis=-1)


def tova(last: Float[Array, "B K G E"]) -> Float[Array, "B K E"]:
    """Attention of the last query, averaged over all heads of the layer, which so keep the same tokens (arXiv
    2401.06104). There one token goes after each query; here all recent tokens are judged at once, by the last query."""
    return jnp.broadcast_to(last.mean(axis=(1, 2))[:, None], (last.shape[0], last.shape[1], last.shape[3]))


def observed(votes: Float[Array, "B K G E"], judged: Bool[Array, "B K E"], width: int) -> Float[Array, "B K E"]:
    """Mean vote of a group's heads, then the largest among `width` neighbours (SnapKV, arXiv 2404.14469, section 4).

    `votes` is the mean attention of the newest queries. Neighbours are entries that lie beside each other in the cache.
    Only `judged` entries count as neighbours: the newest tokens stay anyway, and their votes are left out.
    """
    return pooled(votes.mean(axis=2), judged, width)


def pooled(votes: Float[Array, "B K E"], judged: Bool[Array, "B K E"], width: int) -> Float[Array, "B K E"]:
    """The largest of `width` neighbouring judged votes, with gaps closed."""
    E = votes.shape[-1]
    place = jnp.where(judged, jnp.cumsum(judged, axis=-1) - 1, E)
    scatter = lambda v, at: jnp.zeros(E, v.dtype).at[at].set(v, mode="drop")
    closed = jax.vmap(jax.vmap(scatter))(votes, place)
    sides = ((0, 0), (0, 0), (width // 2, width // 2))
    best = jax.lax.reduce_window(closed, -jnp.inf, jax.lax.max, (1, 1, width), (1, 1, 1), sides)
    return jnp.take_along_axis(best, jnp.minimum(place, E - 1), axis=-1)


RKV_ATTENTION, RKV_SIMILAR = 0.1, 0.5  # lambda of arXiv 2505.24133; cosine from which its code finds keys alike


def rkv(
    votes: Float[Array, "B K E"], redundancy: Float[Array, "B K E"], live: Bool[Array, "B K E"]
) -> Float[Array, "B K E"]:
    """Attention less redundancy, lambda * I - (1 - lambda) * R (R-KV, arXiv 2505.24133).

    `votes` as in SnapKV, but the largest of a group's heads; R is a softmax over `ops.redundancy`. Its code
    takes the largest logit of a group before the softmax; ours the largest attention after it.
    """
    return RKV_ATTENTION * votes - (1 - RKV_ATTENTION) * jax.nn.softmax(redundancy, axis=-1, where=live)


def expected_attention(weight: Float[Array, "B K G E"], v: Float[Array, "B K E H"]) -> Float[Array, "B K E"]:
    """Expected attention of coming queries, mean over the group, times the value's length (arXiv 2510.00636).

    `weight` as in `ops.expected_weight`. There queries are normal before RoPE and turned by the mean rotation
    of the next 512 positions; here the turned queries since the last eviction are taken for the coming ones.
    """
    return weight.mean(axis=2) * jnp.linalg.norm(v.astype(jnp.float32), axis=-1)


PYRAMID = 20  # PyramidKV's beta: the last layer gets a 20th of the mean (arXiv 2406.02069)


def pyramid(budget: int, newest: int, layers: int, seen: Int[Array, " B"]) -> Int[Array, "B L"]:
    """Entries of each head of a layer, `budget` on average exactly (PyramidKV, arXiv 2406.02069, section 4).

    From (2 - 1/20) M' in the first layer down to M'/20 in the last in even steps, where M' is the budget less the
    `newest` tokens, which every layer keeps. No layer is given more than was seen: what is over goes to later layers.
    """
    rest = budget - newest
    if layers == 1:
        return jnp.full((seen.shape[0], 1), budget, jnp.int32)
    highest = jnp.clip(seen - newest, rest, 2 * rest - rest // PYRAMID)[:, None]
    l = jnp.arange(layers + 1, dtype=jnp.int32)[None]
    upto = l * (newest + highest) - (highest - rest) * (l * (l - 1)) // (layers - 1)
    return upto[:, 1:] - upto[:, :-1]

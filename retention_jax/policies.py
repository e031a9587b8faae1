"""Eviction scores: what stays is what scores highest. One short function for each policy.

`score` ranks all entries together, one by one: it depends only on the entry (its statistic, pos, head), on how many
tokens were seen, and on the configuration, so that the order is the same on every device and for every way of reading
the prompt. `layer_score` sees all keys of a layer's heads, and the queries since the last eviction.

The latter policies were published for one eviction at the end of a prompt, or one after every token. Here each runs at
every eviction, on what is left of pool and window by then, with the queries read since the last eviction; attention is
over what is held, exact. Facts are from the papers and from NVIDIA/kvpress. `E` are a head's entries, oldest first.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from retention_jax.config import GLOBAL, OBSERVING, PYRAMID, CacheConfig
from retention_jax.kernels import key_products

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
    2401.06104). There one token goes after each query; here a window's worth goes at once, by the last query alone."""
    return jnp.broadcast_to(last.mean(axis=(1, 2))[:, None], (last.shape[0], last.shape[1], last.shape[3]))


def voted(votes: Float[Array, "B K G E"], judged: Bool[Array, "B K E"], width: int) -> Float[Array, "B K E"]:
    """Mean vote of a group's heads, then the largest among `width` neighbours (SnapKV, arXiv 2404.14469, section 4).

    `votes` is the mean attention of the newest queries. Neighbours are the entries that are held beside each other, and
    only `judged` ones count: the newest tokens, which stay, lend no one their votes.
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


def rkv(votes: Float[Array, "B K E"], redundancy: Float[Array, "B K E"], live: Bool[Array, "B K E"]) -> Array:
    """Attention less redundancy, lambda * I - (1 - lambda) * R (R-KV, arXiv 2505.24133).

    `votes` as in SnapKV, but the largest of a group's heads; R is a softmax over `key_products.redundancy`. Its code
    takes the largest logit of a group before the softmax; ours the largest attention after it.
    """
    return RKV_ATTENTION * votes - (1 - RKV_ATTENTION) * jax.nn.softmax(redundancy, axis=-1, where=live)


def expected_attention(weight: Float[Array, "B K G E"], v: Float[Array, "B K E H"]) -> Float[Array, "B K E"]:
    """Expected attention of coming queries, mean over the group, times the value's length (arXiv 2510.00636).

    `weight` as in `key_products.expected_weight`. There queries are normal before RoPE and turned by the mean rotation
    of the next 512 positions; here the turned queries since the last eviction are taken for the coming ones.
    """
    return weight.mean(axis=2) * jnp.linalg.norm(v.astype(jnp.float32), axis=-1)


class Queries(NamedTuple):
    """Queries since the last eviction."""

    q: Float[Array, "B L Q N H"]
    pos: Int[Array, "B Q"]  # -1: none


def queries_kept(cache: CacheConfig, tokens: int) -> int:
    """How many of the newest queries of `tokens` the policy wants to see."""
    if cache.policy in ("h2o", "expected_attention"):
        return tokens
    if cache.policy == "tova":
        return 1
    return min(cache.observe, tokens) if cache.policy in OBSERVING else 0


def carried(cache: CacheConfig, log_beta: Float[Array, "*axes"], *, prompt: bool) -> Float[Array, "*axes"]:
    """What new entries carry: log_beta for retention; 1 for a prompt's tokens under random_keep_prompt; else 0."""
    if cache.policy == "retention":
        return log_beta
    return jnp.full_like(log_beta, float(prompt and cache.policy == "random_keep_prompt"))


def by_layer(cache: CacheConfig) -> bool:
    """Whether `layer_score` is the policy's, and not `score`."""
    return cache.policy not in GLOBAL


def scope(cache: CacheConfig) -> Literal["all", "layer", "head"]:
    """What shares a budget: everything, the heads of a layer, or a head's entries alone."""
    if cache.policy == "adakv":
        return "layer"
    return "head" if cache.local or by_layer(cache) else "all"


def most_in_a_head(cache: CacheConfig, kv_heads: int) -> int:
    """Entries that one head can own in the pool, for a policy that goes by layer."""
    if cache.policy == "adakv":
        return cache.budget * kv_heads
    return 2 * cache.budget if cache.policy == "pyramidkv" else cache.budget


def reserve(cache: CacheConfig) -> int:
    """Entries of which every head keeps its best: min_per_head, and AdaKV's safeguard of 0.2 (arXiv 2407.11550).

    As in kvpress, a head's safe fifth is taken first and the rest goes to the best. Its authors' code adds a fifth of
    the budget to four fifths of what the head would win without a safeguard.
    """
    return max(cache.min_per_head, cache.budget // 5 if cache.policy == "adakv" else 0)


def pyramid(cache: CacheConfig, layers: int, seen: Int[Array, " B"]) -> Int[Array, "B L"]:
    """Entries of each head of a layer, M on average exactly (PyramidKV, arXiv 2406.02069, section 4).

    From (2 - 1/20) M' in the first layer down to M'/20 in the last in even steps, M' = M less the newest tokens, which
    every layer keeps. No layer is given more than was seen: what is over goes to the later ones.
    """
    kept, rest = cache.newest, cache.budget - cache.newest
    if layers == 1:
        return jnp.full((seen.shape[0], 1), cache.budget, jnp.int32)
    highest = jnp.clip(seen - kept, rest, 2 * rest - rest // PYRAMID)[:, None]
    l = jnp.arange(layers + 1, dtype=jnp.int32)[None]
    upto = l * (kept + highest) - (highest - rest) * (l * (l - 1)) // (layers - 1)
    return upto[:, 1:] - upto[:, :-1]


def layer_score(
    cache: CacheConfig,
    k: Float[Array, "B K E H"],
    v: Float[Array, "B K E H"],
    stat: Float[Array, "B K E"],
    pos: Int[Array, "B K E"],
    seen: Int[Array, " B"],
    q: Float[Array, "B Q N H"] | None,
    query_pos: Int[Array, "B Q"] | None,
    window: Int[Array, ""] | None,
) -> tuple[Float[Array, "B K E"], Float[Array, "B K E"]]:
    """Scores of one layer's entries, pool and window together (pos -1: dead), and what they carry from now on.

    H2O (arXiv 2306.14048) ranks by all attention received so far, summed over the group; half of a head's budget goes
    to the newest tokens. SnapKV's kind keeps the `observe` newest tokens, as far as half the budget. The sinks of
    Expected Attention stay.
    """
    live, highest = pos >= 0, jnp.finfo(jnp.float32).max
    newest = pos >= (seen - cache.newest)[:, None, None]

    def attention(count: int) -> Float[Array, "B K G E"]:
        assert q is not None and query_pos is not None
        chosen = jnp.where(query_pos >= (seen - count)[:, None], query_pos, -1)
        total = key_products.received(q, chosen, k, pos, window)
        return total / jnp.maximum((chosen >= 0).sum(axis=1), 1).astype(total.dtype)[:, None, None, None]

    match cache.policy:
        case "key_norm":
            return key_norm(k), stat
        case "key_diff":
            return key_diff(k, live), stat
        case "tova":
            return tova(attention(1)), stat
        case "h2o":
            assert q is not None and query_pos is not None
            stat = stat + key_products.received(q, query_pos, k, pos, window).sum(axis=2).astype(jnp.float32)
            return jnp.where(newest, highest, stat), stat
        case "rkv":
            votes = pooled(attention(cache.observe).max(axis=2), live & ~newest, cache.pool_width)
            alike = key_products.redundancy(k, live, RKV_SIMILAR)
            return jnp.where(newest, highest, rkv(votes, alike, live)), stat
        case "expected_attention":
            assert q is not None and query_pos is not None
            usual = jnp.where(query_pos >= STREAMING_SINKS, query_pos, -1)
            score = expected_attention(key_products.expected_weight(q, usual, k, live), v)
            return jnp.where(pos < STREAMING_SINKS, highest, score), stat
        case _:  # snapkv, pyramidkv, adakv
            votes = voted(attention(cache.observe), live & ~newest, cache.pool_width)
            return jnp.where(newest, highest, votes), stat


def score(
    cache: CacheConfig,
    stat: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    seen: Int[Array, " B"],
) -> Float[Array, "B E"]:
    """The score of every entry under a policy that ranks all together; `head` counts layer * K + key/value head."""
    match cache.policy:
        case "streaming":
            return streaming(pos)
        case "random":
            return random(pos, head, cache.seed)
        case "random_keep_prompt":  # arXiv 2609.03430, which draws for each head by itself (local=True)
            return stat + random(pos, head, cache.seed)
        case _:
            return retention(stat, pos, seen, cache.horizon)

"""Which pairs (block of queries, block of keys) an attention kernel on TPU visits, as scalars that it prefetches.

A pair is left out for one of four reasons, none of which changes a bit of the float32 result:

- acausal: every key is later than every query;
- other documents: the ranges of segment ids do not overlap;
- out of reach of the window;
- decayed: every weight is exactly 0 in float32. The proof: a query t sees itself, so the maximum m_t of its logits is
  at least q_t.k_t scale >= -|q_t||k_t| scale, and a key i of the pair has logit at most |q_t||k_i| scale + age
  log_beta_i. With |q| <= Q over all queries of the key/value head, |k_i| <= A in the block and |k| <= C over all keys,
  logit - m_t <= Q (A + C) scale + (smallest age) * (largest log_beta). Below the logarithm of float32's smallest
  number, e^that is 0: nothing is added to the sums, the maximum stays, and in the backward pass p = ds = 0. The kernels
  visit a query's own block first, so that this holds for the running maximum too.

The first two depend on the sequence alone and shape the list of pairs; the last two say, for every key/value head,
which query block is the last that a key block reaches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

VANISHED = float(np.log(np.finfo(np.float32).smallest_subnormal)) - 1  # e^this is 0, with a margin for how exp is made
_BITS = 14  # of a block's number: 16,384 blocks


class Pairs(NamedTuple):
    """Prefetched scalars, flat. A code packs query block, key block, and whether the pair needs a mask and is real."""

    codes: Int[Array, " B_steps"]
    reach: Int[Array, " BK_n"]  # the last query block that each key block reaches
    window: Int[Array, " 1"]
    steps: Int[Array, ""]  # pairs of the sequence that has most


class Pair(NamedTuple):
    query: Any
    key: Any
    masked: Any  # some of its logits are hidden
    live: Any  # False past the end of a sequence's list


def pair_at(codes: Any, row: Any, step: Any, *, heads: int, blocks: int) -> Pair:
    """The pair that a program of `row` = b * heads + head visits at `step`."""
    code = codes[row // heads * (blocks * (blocks + 1) // 2) + step]
    low = (1 << _BITS) - 1
    return Pair((code >> _BITS) & low, code & low, (code >> 2 * _BITS) & 1 == 1, (code >> (2 * _BITS + 1)) & 1 == 1)


def last_reached(
    q: Float[Array, "BK G T H"],
    k: Float[Array, "BK T H"],
    log_beta: Float[Array, "BK T"],
    window: Int[Array, ""],
    block: int,
    scale: float,
) -> Int[Array, "BK n"]:
    """The last query block in which a key of each block can still weigh anything."""
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))
    q_norm = norm(q).max(axis=(1, 2))[:, None]
    k_norm = norm(k).reshape(k.shape[0], -1, block).max(axis=2)
    # 1.01: norms and logits are rounded too.
    highest = 1.01 * scale * q_norm * (k_norm + k_norm.max(axis=1, keepdims=True))
    slowest = log_beta.reshape(*k_norm.shape, block).max(axis=2)
    return reached(slowest, highest, window, block)


def reached(
    slowest: Float[Array, "*rows n"], highest: Float[Array, "*rows n"] | float, window: Int[Array, ""], block: int
) -> Int[Array, "*rows n"]:
    """The last block at which `e^(highest + age * slowest)` is not yet 0 in float32 and the age below the window."""
    n = slowest.shape[-1]
    length = jnp.float32(n * block)
    vanishes_at = (highest - VANISHED) / jnp.maximum(-slowest, 1e-30)  # the age in tokens
    # The comparison is false for nan, which must not hide anything.
    vanishes_at = jnp.where(vanishes_at < length, vanishes_at, length)
    visible_for = jnp.minimum(vanishes_at.astype(jnp.int32) + 1, window)
    # The smallest age in blocks i and j is (i - j - 1) block + 1; it must stay below `visible_for`.
    own = jax.lax.broadcasted_iota(jnp.int32, slowest.shape, slowest.ndim - 1)
    return jnp.minimum(own + (visible_for + block - 2) // block, n - 1)


def visible_pairs(
    segment_ids: Int[Array, "B T"], reach: Int[Array, "BK n"], window: Int[Array, ""], block: int, *, by_key: bool
) -> Pairs:
    """The pairs to visit: for each query block its key blocks from its own downwards, or for each key block (`by_key`)
    its query blocks from its own upwards. Every block is in the list with itself."""
    B, n = segment_ids.shape[0], reach.shape[1]
    if by_key:
        order = [(i, j) for j in range(n) for i in range(j, n)]
    else:
        order = [(i, j) for i in range(n) for j in range(i, -1, -1)]
    query, key = np.array(order, np.int32).T
    blocked = segment_ids.reshape(B, n, block)
    low, high = blocked.min(axis=2), blocked.max(axis=2)
    overlap = (low[:, query] <= high[:, key]) & (low[:, key] <= high[:, query])
    visible = overlap & (reach.reshape(B, -1, n)[:, :, key] >= query[None, None]).any(axis=1)
    one_segment = (low[:, query] == high[:, key]) & (high[:, query] == low[:, key])
    oldest = jnp.asarray((query - key + 1) * block - 1)
    masked = (jnp.asarray(query == key) | (oldest >= window))[None] | ~one_segment
    codes = jnp.asarray(query << _BITS | key)[None] | masked.astype(jnp.int32) << 2 * _BITS

    # The invisible pairs leave the list without a sort, which takes a TPU compiler seconds: at a step stands the first
    # pair up to which so many are visible. Past the end the last one is repeated, so that nothing new is fetched.
    so_far = jnp.cumsum(visible, axis=1, dtype=jnp.int32)
    count = so_far[:, -1]
    step = jnp.arange(len(order), dtype=jnp.int32)
    wanted = jnp.minimum(step[None], count[:, None] - 1) + 1
    at = jax.vmap(lambda c, w: jnp.searchsorted(c, w, method="compare_all"))(so_far, wanted)
    live = (step[None] < count[:, None]).astype(jnp.int32) << (2 * _BITS + 1)
    codes = jnp.take_along_axis(codes, at, axis=1) | live
    return Pairs(codes.reshape(-1), reach.reshape(-1), window.reshape(1), count.max())


def check_attention_inputs(q: Array, k: Array, v: Array, where: str) -> None:
    """Raises ValueError unless the kernels of retention attention take such queries, keys and values, [B, T, heads, H].

    `where` they run is told.
    """
    N, K = q.shape[2], k.shape[2]
    if N % K:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {N} and {K}")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"retention_attention {where} takes q, k and v all in float32 or all in bfloat16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )

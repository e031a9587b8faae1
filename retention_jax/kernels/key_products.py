"""Sums, over queries, of something made of their products with keys: the statistics that eviction policies want.

Plain XLA, exact, with no matrix of all queries and keys: a block of queries at a time. `E` are the entries of a head,
oldest first, some of them dead; queries are those of all heads, `Q` in number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 2**24  # products that exist at one time


def over_queries(
    each: Callable[[Float[Array, "B K G block E"], Int[Array, "B heads block"]], Float[Array, "B K G block E"]],
    q: Float[Array, "B Q N H"],
    mark: Int[Array, "B heads Q"],
    k: Float[Array, "B K E H"],
) -> Float[Array, "B K G E"]:
    """Sum of `each(products, marks)` over queries, at least float32.

    `mark` is what `each` needs to know of a query, for all heads (heads = 1) or for each of K, at least 0. It is -1 for
    the queries that fill up the last block, and where the caller says so; `each` must be 0 there.
    """
    (B, Q, N, H), (K, E) = q.shape, k.shape[1:3]
    wide = np.promote_types(q.dtype, np.float32)
    block = int(np.clip(_BLOCK // max(B * N * E, 1), 1, max(Q, 1)))
    blocks = -(-Q // block)
    q = jnp.pad(q.reshape(B, Q, K, N // K, H), ((0, 0), (0, blocks * block - Q), *((0, 0),) * 3))
    mark = jnp.pad(mark, ((0, 0), (0, 0), (0, blocks * block - Q)), constant_values=-1)

    def add(i, total):
        of_block, marks = (jax.lax.dynamic_slice_in_dim(a, i * block, block, axis) for a, axis in ((q, 1), (mark, 2)))
        products = jnp.einsum("bqkgh,bkeh->bkgqe", of_block, k, preferred_element_type=wide)
        return total + each(products, marks).sum(axis=3)

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((B, K, N // K, E), wide))


def received(
    q: Float[Array, "B Q N H"],
    query_pos: Int[Array, "B Q"],
    k: Float[Array, "B K E H"],
    pos: Int[Array, "B K E"],
    window: Int[Array, ""] | None,
) -> Float[Array, "B K G E"]:
    """The attention that each entry gets from the queries, one sum for each query head of its group.

    A query attends to the live entries (pos >= 0) that are not newer than itself and, with a sliding `window`, less
    than that many tokens older: ordinary attention over what is held. A query at position -1 is none.
    """
    scale = q.shape[-1] ** -0.5

    def weights(products, at):
        age = at[..., None] - pos[:, :, None]
        visible = (at[..., None] >= 0) & (pos[:, :, None] >= 0) & (age >= 0)
        visible = (visible if window is None else visible & (age < window))[:, :, None]
        logits = jnp.where(visible, products * scale, -jnp.inf)
        top = jnp.maximum(logits.max(axis=-1, keepdims=True), jnp.finfo(logits.dtype).min)
        unscaled = jnp.exp(logits - top)
        return unscaled / jnp.maximum(unscaled.sum(axis=-1, keepdims=True), 1e-30)

    return over_queries(weights, q, query_pos[:, None], k)


def expected_weight(
    q: Float[Array, "B Q N H"], query_pos: Int[Array, "B Q"], k: Float[Array, "B K E H"], live: Bool[Array, "B K E"]
) -> Float[Array, "B K G E"]:
    """Softmax over live entries of the log of E[exp(q . k * H^-0.5)], q normal with the queries' mean and covariance.

    That log is mu . k * H^-0.5 + k . Sigma k / (2 H); k . Sigma k is the variance of the products. A query at position
    -1 is none.
    """
    (B, _, N, H), K = q.shape, k.shape[1]
    wide = np.promote_types(q.dtype, np.float32)
    real = (query_pos >= 0)[:, :, None, None]
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1).astype(wide)
    mean = jnp.where(real, q, 0).astype(wide).sum(axis=1, keepdims=True) / count
    centred = jnp.where(real, q.astype(wide) - mean, 0)
    squares = lambda products, at: jnp.where((at >= 0)[:, :, None, :, None], products**2, 0)
    variance = over_queries(squares, centred, query_pos[:, None], k.astype(wide)) / count
    logits = jnp.einsum("bkgh,bkeh->bkge", mean.reshape(B, K, N // K, H), k.astype(wide)) * H**-0.5 + variance / (2 * H)
    return jax.nn.softmax(logits, axis=-1, where=live[:, :, None])


def redundancy(k: Float[Array, "B K E H"], live: Bool[Array, "B K E"], similar: float) -> Float[Array, "B K E"]:
    """Mean cosine similarity of each live key to the others of its head; the newest of those alike is left alone.

    A key does not count against the newest of the other keys whose similarity with it is above `similar`.
    """
    wide = np.promote_types(k.dtype, np.float32)
    length = jnp.sqrt((k.astype(wide) ** 2).sum(axis=-1, keepdims=True))
    unit = jnp.where(live[..., None], k / jnp.maximum(length, 1e-8), 0)
    index = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.int32), live.shape)

    def counted(products, at):
        other = (at[..., None] >= 0) & live[:, :, None] & (at[..., None] != index[:, :, None])
        cosine = jnp.where(other[:, :, None], products, 0)
        newest = jnp.where(cosine > similar, index[:, :, None, None], -1).max(axis=-1, keepdims=True)
        return jnp.where(index[:, :, None, None] == newest, 0, cosine)

    total = over_queries(counted, unit.swapaxes(1, 2), jnp.where(live, index, -1), unit)[:, :, 0]
    return total / jnp.maximum(live.sum(axis=-1, keepdims=True), 1).astype(wide)

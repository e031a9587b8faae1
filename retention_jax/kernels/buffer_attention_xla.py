"""Attention of new tokens over the buffer in plain XLA: the pool and the recent window.

Two softmaxes over disjoint keys are merged by their log-sum-exp. The pool is read through a work list of blocks that
each lie in one head's segment, so the cost follows the live entries of the layer, not the fullest head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from retention_jax.kernels.partial_softmax import Partial, merge


class Window(NamedTuple):
    """What a layer with a sliding window needs to know besides: a query sees keys less than `size` tokens old."""

    size: Int[Array, ""]  # tokens, the query's own included
    seen: Int[Array, " B"]  # tokens before the new ones
    recent_pos: Int[Array, " B"]  # position of the recent window's first token
    pool_pos: Int[Array, "B S"]


class _HeadPartial(NamedTuple):
    """A partial softmax by key/value head; `Q` = G*T queries of a head."""

    out: Float[Array, "B K Q H"]
    lse: Float[Array, "B K Q"]


def buffer_attention(
    q: Float[Array, "B T N H"],
    *,
    pool_k: Float[Array, "B S H"],
    pool_v: Float[Array, "B S H"],
    offset: Int[Array, "B K_and_1"],
    recent_k: Float[Array, "B L K R H"],
    recent_v: Float[Array, "B L K R H"],
    recent_range: Int[Array, "B 2"],
    layer: Int[Array, ""],
    window: Window | None = None,
) -> Partial:
    """Ordinary attention of T new tokens over everything their key/value head holds, the new tokens not included.

    `offset` bounds the pool segments of this layer's heads, `recent_range` the part of the layer's recent windows that
    is attended to, from the first token up to before the second. Without a `window` there are no masks by age.

    Raises:
      ValueError: if the pools of all rows have 2^31 slots or more.
    """
    B, T, N, H = q.shape
    K = recent_k.shape[2]
    G = N // K
    of_layer = lambda a: jax.lax.dynamic_index_in_dim(a, layer, axis=1, keepdims=False)
    # The oldest position that each query sees.
    oldest, recent_pos, pool_pos = None, None, None
    if window is not None:
        one_head = window.seen[:, None] + jnp.arange(T, dtype=jnp.int32)[None] - window.size + 1
        oldest, pool_pos = jnp.tile(one_head, (1, G)), window.pool_pos
        recent_pos = window.recent_pos[:, None] + jnp.arange(recent_k.shape[3], dtype=jnp.int32)[None]

    by_token = lambda a: (
        a.reshape(B, K, G, T, *a.shape[3:]).swapaxes(1, 3).swapaxes(2, 3).reshape(B, T, N, *a.shape[3:])
    )

    def attend(q: Float[Array, "B T N H"]) -> Partial:
        queries = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
        parts = (
            _pool_part(queries, pool_k, pool_v, offset, pool_pos, oldest),
            _dense_part(queries, of_layer(recent_k), of_layer(recent_v), recent_range, recent_pos, oldest),
        )
        return merge([Partial(by_token(p.out), by_token(p.lse)) for p in parts])

    if T == 1:  # a token that is decoded: something came before it
        return attend(q)
    holds_any = jnp.any(offset[:, -1] > offset[:, 0]) | jnp.any(recent_range[:, 1] > recent_range[:, 0])
    return jax.lax.cond(holds_any, attend, _attend_to_nothing, q)


def _attend_to_nothing(q: Float[Array, "B T N H"]) -> Partial:
    wide = np.promote_types(q.dtype, np.float32)
    return Partial(jnp.zeros(q.shape, wide), jnp.full(q.shape[:3], -jnp.inf, wide))


def _dense_part(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K R H"],
    v: Float[Array, "B K R H"],
    live: Int[Array, "B 2"],
    pos: Int[Array, "B R"] | None,
    oldest: Int[Array, "B Q"] | None,
) -> _HeadPartial:
    """Softmax over the `live` keys of a dense window, from position `oldest` on."""
    index = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    visible = ((index >= live[:, :1]) & (index < live[:, 1:]))[:, None]
    if pos is not None and oldest is not None:
        visible = visible & (pos[:, None] >= oldest[:, :, None])
    logits = jnp.where(visible[:, None], _logits("bkqh,bkrh->bkqr", q, k), -jnp.inf)
    top = jnp.maximum(logits.max(axis=-1), jnp.finfo(logits.dtype).min)  # finite, so that an empty window gives zeros
    weights = jnp.exp(logits - top[..., None])
    mass = weights.sum(axis=-1)
    out = jnp.einsum("bkqr,bkrh->bkqh", weights, v.astype(weights.dtype))
    return _HeadPartial(out / jnp.maximum(mass, 1e-30)[..., None], jnp.where(mass > 0, top + jnp.log(mass), -jnp.inf))


def block_size(slots: int, heads: int) -> int:
    """Pool slots read at a time: about what a head of a one-layer pool holds, so that small segments waste little."""
    return min(slots, max(16, min(256, 1 << (max(1, slots // heads) - 1).bit_length())))


def _pool_part(
    q: Float[Array, "B K Q H"],
    pool_k: Float[Array, "B S H"],
    pool_v: Float[Array, "B S H"],
    offset: Int[Array, "B K_and_1"],
    pos: Int[Array, "B S"] | None = None,
    oldest: Int[Array, "B Q"] | None = None,
) -> _HeadPartial:
    """Softmax of each head over its own segment of the pool, from position `oldest` on, a block of a head at a time."""
    B, K, Q, H = q.shape
    slots = pool_k.shape[1]
    block = block_size(slots, K)
    blocks = -(-(offset[:, 1:] - offset[:, :-1]) // block)
    last = jnp.cumsum(blocks, axis=1, dtype=jnp.int32)  # work items up to and including each head
    wide = np.promote_types(q.dtype, np.float32)
    lowest = jnp.finfo(wide).min

    # One array for all rows, with one index: for batched slices, or rows and slots apart, TPU's compiler would copy the
    # pool to a new layout.
    if B * slots > (most := jnp.iinfo(jnp.int32).max):
        raise ValueError(f"buffer_attention in XLA numbers slots with 32 bits: at most {most}, got {B} * {slots}")
    flat_k, flat_v = (a.reshape(B * slots, H) for a in (pool_k, pool_v))

    def one_row(item, state, row, q, offset, last, blocks, pos, oldest):
        """Adds one block to the running softmax (top, mass, out) of its head; nothing past the end of the list."""
        head = jnp.minimum(jnp.searchsorted(last, item, side="right"), K - 1)
        begin = offset[head] + (item - last[head] + blocks[head]) * block
        start = jnp.minimum(begin, slots - block)
        slot = start + jnp.arange(block)
        visible = ((slot >= begin) & (slot < offset[head + 1]))[None]
        if pos is not None:
            visible = visible & (jax.lax.dynamic_slice_in_dim(pos, start, block)[None] >= oldest[:, None])
        keys, values = (jax.lax.dynamic_slice_in_dim(a, row * slots + start, block) for a in (flat_k, flat_v))
        top, mass, out = (jax.lax.dynamic_index_in_dim(a, head, keepdims=False) for a in state)
        logits = jnp.where(visible, _logits("qh,sh->qs", q[head], keys), -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        weights, shrink = jnp.exp(logits - new_top[:, None]), jnp.exp(top - new_top)
        mass = mass * shrink + weights.sum(axis=-1)
        out = out * shrink[:, None] + weights @ values.astype(wide)
        return tuple(
            jax.lax.dynamic_update_index_in_dim(a, b, head, 0) for a, b in zip(state, (new_top, mass, out), strict=True)
        )

    def body(item, state):
        return jax.vmap(functools.partial(one_row, item))(state, rows, q, offset, last, blocks, pos, oldest)

    rows = jnp.arange(B, dtype=jnp.int32)
    start = (jnp.full((B, K, Q), lowest, wide), jnp.zeros((B, K, Q), wide), jnp.zeros((B, K, Q, H), wide))
    top, mass, out = jax.lax.fori_loop(0, jnp.max(last[:, -1]), body, start)
    return _HeadPartial(out / jnp.maximum(mass, 1e-30)[..., None], jnp.where(mass > 0, top + jnp.log(mass), -jnp.inf))


def _logits(spec: str, q: Float[Array, "..."], k: Float[Array, "..."]) -> Float[Array, "..."]:
    wide = np.promote_types(q.dtype, np.float32)
    return jnp.einsum(spec, q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5

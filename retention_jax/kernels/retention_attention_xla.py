"""`reference.retention_attention` in plain jnp, a block of queries at a time: O(T) memory, forward and backward.

Tokens are cut into blocks of R. The n = T / R blocks of queries are taken one after the other. Each attends in one
piece to all blocks of keys that it may see: those from the first one that shares a document with it, or that its window
reaches, up to its own. A step is a few large matrix products, and no softmax is ever merged with another:

    s = q k^T / sqrt(H) + (t - i) log_beta_i      p = e^(s - max s)      out = p v / sum p      lse = max s + log sum p

The backward pass makes the logits again, and adds to the gradients of the keys:

    p = e^(s - lse)      dv += p^T do      ds = p (do v^T - delta)      delta = sum_h do out - dlse
    dq = ds k            dk += ds^T q      dlog_beta_i += sum_t ds (t - i)

Shapes are static, so how many blocks of keys a step reads is one of a few sizes, the next that is enough. Each of them
is compiled, and a step runs one. A sum over all keys of a long row costs a sixteenth more on average than it must.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

LARGEST_BLOCK = 128  # tokens: on a CPU core at T = 2048 larger ones waste more on what comes later, smaller ones divide
ROUND = 8  # block sizes are multiples of it: vector lanes


def block_size(length: int) -> int:
    """Tokens in a block: as few blocks as `LARGEST_BLOCK` allows, all of nearly equal fill."""
    blocks = -(-length // LARGEST_BLOCK)
    return -(-length // (blocks * ROUND)) * ROUND


def key_sizes(blocks: int) -> tuple[int, ...]:
    """How many blocks of keys a step may read, of so many: eighths of them, and below two sizes for each doubling."""
    eighth = -(-blocks // 8)
    small = {factor << power for factor in (2, 3) for power in range(eighth.bit_length())}
    return (*sorted(size for size in {1, *small} if size < eighth), *range(eighth, blocks, eighth), blocks)


class Blocks(NamedTuple):
    """Queries cut into n blocks of R tokens, keys whole: T = n R. `K` heads lie next to the batch, G R query rows."""

    q: Float[Array, "n B K GR H"]
    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    log_beta: Float[Array, "B K T"]
    segment: Int[Array, "B T"]
    window: Int[Array, ""] | None  # keys this many tokens old or older are not seen

    @property
    def block(self) -> int:
        """R."""
        return self.segment.shape[1] // self.q.shape[0]


def _pad(x: Num[Array, "B T *rest"], block: int) -> Num[Array, "B nR *rest"]:
    # A padded row sees itself, so its softmax is finite, and real rows come before it, so they never see it.
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _split_queries(x: Float[Array, "B T heads H"], groups: int, block: int) -> Float[Array, "n B K GR H"]:
    x = _pad(x, block)
    B, T, heads, H = x.shape
    x = x.reshape(B, T // block, block, heads // groups, groups, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(T // block, B, heads // groups, groups * block, H)


def _join_queries(x: Float[Array, "n B K GR *H"], groups: int, length: int) -> Float[Array, "B T heads *H"]:
    n, B, K, GR, *rest = x.shape
    x = jnp.moveaxis(x.reshape(n, B, K, groups, GR // groups, *rest), (1, 0, 4), (0, 1, 2))
    return x.reshape(B, -1, K * groups, *rest)[:, :length]


def _blocks(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, block: int
) -> Blocks:
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    dtype = np.promote_types(q.dtype, np.float32)
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on it is as good as -inf: e^logit is exactly 0.
    log_beta = jnp.maximum(log_beta.astype(dtype), float(jnp.finfo(dtype).min) / (2 * T))
    heads_first = lambda x: _pad(x, block).swapaxes(1, 2)
    return Blocks(
        _split_queries(q, G, block),
        heads_first(k),
        heads_first(v),
        heads_first(log_beta.swapaxes(1, 2)),
        _pad(segment_ids, block),
        window,
    )


def visible_blocks(
    segment: Int[Array, "B T"], window: Int[Array, ""] | None, block: int
) -> Bool[Array, "n_queries n_keys"]:
    """Whether a block of queries can see a block of keys in some row: segment ids overlap, and the window reaches."""
    by_block = segment.reshape(segment.shape[0], -1, block)
    low, high = by_block.min(axis=-1), by_block.max(axis=-1)
    overlap = jnp.any((low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None]), axis=0)
    index = jnp.arange(by_block.shape[1], dtype=jnp.int32)
    apart = index[:, None] - index[None]
    seen = overlap & (apart >= 0)
    return seen if window is None else seen & ((apart - 1) * block + 1 < window)


def over_query_blocks(step: Callable[[int, Array, Array, Any], Any], state: Any, seen: Bool[Array, "n n"]) -> Any:
    """Folds `step(size, i, first, state)` over blocks i of queries, with the `size` blocks of keys from `first` on.

    Size is the smallest of `key_sizes` that holds all that block i can see; some of its keys may come after the block.
    One loop for each size takes the blocks that need it: in one loop that branches over sizes, every branch would copy
    the whole state.

    While loops, not scans: of a scan within a differentiated layer, JAX computes beforehand what does not depend on
    differentiated values, here every step's mask and ages, and keeps them, T x T in all.
    """
    n = seen.shape[0]
    sizes, index = key_sizes(n), jnp.arange(n, dtype=jnp.int32)
    needed = index + 1 - jnp.argmax(seen, axis=1).astype(jnp.int32)
    order = jnp.argsort(needed).astype(jnp.int32)
    ends = (needed[None] <= jnp.array(sizes, jnp.int32)[:, None]).sum(axis=1, dtype=jnp.int32)
    at = jnp.int32(0)
    for size, end in zip(sizes, ends, strict=True):

        def body(carry: tuple[Array, Any], size: int = size) -> tuple[Array, Any]:
            at, state = carry
            i = order[at]
            return at + 1, step(size, i, jnp.maximum(i + 1 - size, 0), state)

        at, state = lax.while_loop(lambda carry, end=end: carry[0] < end, body, (at, state))
    return state


class Tile(NamedTuple):
    """What a block of queries reads: keys of `size` blocks, and how it sees them. In the wide dtype."""

    q: Float[Array, "B K GR H"]  # scaled
    k: Float[Array, "B K I H"]
    v: Float[Array, "B K I H"]
    log_beta: Float[Array, "B K I"]
    age: Int[Array, "R I"]
    visible: Bool[Array, "B R I"]


def _tile(x: Blocks, size: int, i: Array, first: Array) -> Tile:
    dtype, R = x.log_beta.dtype, x.block
    keys = lambda a, axis: lax.dynamic_slice_in_dim(a, first * R, size * R, axis)
    age = (i - first) * R + jnp.arange(R, dtype=jnp.int32)[:, None] - jnp.arange(size * R, dtype=jnp.int32)[None]
    in_reach = age >= 0 if x.window is None else (age >= 0) & (age < x.window)
    own = lax.dynamic_slice_in_dim(x.segment, i * R, R, 1)
    return Tile(
        x.q[i].astype(dtype) * x.q.shape[-1] ** -0.5,
        keys(x.k, 2).astype(dtype),
        keys(x.v, 2).astype(dtype),
        keys(x.log_beta, 2),
        age,
        in_reach[None] & (own[:, :, None] == keys(x.segment, 1)[:, None]),
    )


def _forward(x: Blocks) -> tuple[Float[Array, "n B K GR H"], Float[Array, "n B K GR"]]:
    dtype, R = x.log_beta.dtype, x.block

    def step(size: int, i: Array, first: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        tile = _tile(x, size, i, first)
        B, K, GR, H = tile.q.shape
        logits = jnp.einsum("bkth,bkih->bkti", tile.q, tile.k).reshape(B, K, -1, R, size * R)
        decay = tile.age.astype(dtype)[None, None] * tile.log_beta[:, :, None]
        logits = jnp.where(tile.visible[:, None, None], logits + decay[:, :, None], -jnp.inf)
        top = logits.max(axis=-1)
        weights = jnp.exp(logits - top[..., None])
        mass = weights.sum(axis=-1).reshape(B, K, GR)
        out = jnp.einsum("bkti,bkih->bkth", weights.reshape(B, K, GR, -1), tile.v) / mass[..., None]
        return state[0].at[i].set(out), state[1].at[i].set(top.reshape(B, K, GR) + jnp.log(mass))

    state = jnp.zeros(x.q.shape, dtype), jnp.zeros(x.q.shape[:-1], dtype)
    return over_query_blocks(step, state, visible_blocks(x.segment, x.window, R))


class Gradients(NamedTuple):
    """Of what `Blocks` holds, in the wide dtype."""

    q: Float[Array, "n B K GR H"]
    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    log_beta: Float[Array, "B K T"]


def _backward(
    x: Blocks, do: Float[Array, "n B K GR H"], lse: Float[Array, "n B K GR"], delta: Float[Array, "n B K GR"]
) -> Gradients:
    dtype, R = x.log_beta.dtype, x.block

    def step(size: int, i: Array, first: Array, grads: Gradients) -> Gradients:
        tile = _tile(x, size, i, first)
        B, K, GR, H = tile.q.shape
        # Keys lie along the slow axis: three of the products add over queries, and want them along the fast one.
        shape = (B, K, size * R, GR // R, R)
        by_query = lambda a: a[i].reshape(B, K, 1, GR // R, R)
        age = tile.age.T.astype(dtype)
        logits = jnp.einsum("bkih,bkth->bkit", tile.k, tile.q).reshape(shape)
        logits = logits + (age[None, None] * tile.log_beta[..., None])[:, :, :, None]
        logits = jnp.where(tile.visible.swapaxes(1, 2)[:, None, :, None], logits, -jnp.inf)
        p = jnp.exp(logits - by_query(lse))
        dp = jnp.einsum("bkih,bkth->bkit", tile.v, do[i]).reshape(shape)
        ds = (p * (dp - by_query(delta))).reshape(B, K, -1, GR)
        p = p.reshape(ds.shape)
        # Ages as two parts, of the query and of the key: the sum over queries is then a matrix product.
        of_query = jnp.stack([jnp.tile(tile.age[:, 0], GR // R).astype(dtype), jnp.ones(GR, dtype)])
        sums = jnp.einsum("bkit,bkct->bkic", ds, jnp.broadcast_to(of_query, (B, K, 2, GR)))
        dlog_beta = sums[..., 0] - sums[..., 1] * jnp.arange(size * R, dtype=dtype)[None, None]
        dq = jnp.einsum("bkit,bkih->bkht", ds, tile.k)
        dk = jnp.einsum("bkit,bkth->bkih", ds, tile.q)
        dv = jnp.einsum("bkit,bkth->bkih", p, do[i])

        def add(total: Array, part: Array) -> Array:
            old = lax.dynamic_slice_in_dim(total, first * R, size * R, 2)
            return lax.dynamic_update_slice_in_dim(total, old + part, first * R, 2)

        return Gradients(grads.q.at[i].set(dq), add(grads.k, dk), add(grads.v, dv), add(grads.log_beta, dlog_beta))

    queries_last = jnp.zeros((*x.q.shape[:3], x.q.shape[4], x.q.shape[3]), dtype)
    zeros = Gradients(queries_last, *(jnp.zeros(a.shape, dtype) for a in (x.k, x.v, x.log_beta)))
    grads = over_query_blocks(step, zeros, visible_blocks(x.segment, x.window, R))
    return grads._replace(q=grads.q.swapaxes(3, 4) * x.q.shape[-1] ** -0.5)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, block: int
) -> tuple[Array, Array]:
    return _attention_fwd(q, k, v, log_beta, segment_ids, window, block)[0]


def _attention_fwd(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, block: int
) -> Any:
    (_, T, N, _), K = q.shape, k.shape[2]
    out, lse = _forward(_blocks(q, k, v, log_beta, segment_ids, window, block))
    out, lse = _join_queries(out, N // K, T), _join_queries(lse, N // K, T)
    # The residual `out` stays wide: rounded to bfloat16 it would cost log_beta's float32 gradient its last 16 bits.
    return (out.astype(q.dtype), lse.swapaxes(1, 2)), (q, k, v, log_beta, segment_ids, window, out, lse)


def _attention_bwd(block: int, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, log_beta, segment_ids, window, out, lse = residuals
    (_, T, N, _), K = q.shape, k.shape[2]
    do, dlse = cotangents[0].astype(out.dtype), cotangents[1].swapaxes(1, 2)
    delta = (do * out).sum(-1) - dlse
    rows = [_split_queries(a, N // K, block) for a in (do, lse[..., None], delta[..., None])]
    x = _blocks(q, k, v, log_beta, segment_ids, window, block)
    grads = _backward(x, rows[0], rows[1][..., 0], rows[2][..., 0])
    return (
        _join_queries(grads.q, N // K, T).astype(q.dtype),
        grads.k.swapaxes(1, 2)[:, :T].astype(k.dtype),
        grads.v.swapaxes(1, 2)[:, :T].astype(v.dtype),
        grads.log_beta[..., :T].astype(log_beta.dtype),
        None,
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


def retention_attention_with_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`retention_attention` and each row's log-sum-exp of logits (natural log, at least float32).

    With it the rows can be merged with attention over other keys.

    Raises:
      ValueError: if N is not a multiple of K.
    """
    N, K = q.shape[2], k.shape[2]
    if N % K:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {N} and {K}")
    return _attention(q, k, v, log_beta, segment_ids, window, block_size(q.shape[1]))


def retention_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents, in which every key fades with age: `reference.retention_attention`.

    A `window` saves the blocks out of its reach, and documents those before the first that a block of tokens is in.

    Memory grows with T, not T^2, forward and backward; gradients reach q, k, v and log_beta.

    Raises:
      ValueError: if N is not a multiple of K.
    """
    return retention_attention_with_lse(q, k, v, log_beta, segment_ids, window)[0]

"""`reference.retention_attention` block by block in plain jnp: O(T) memory, forward and backward, on any device.

Tokens are cut into blocks of R. A list of all pairs (block i of queries, block j <= i of keys), made while tracing, is
scanned; each step makes one R x R tile of logits and folds it into block i's running softmax

    m' = max(m, max_j s)    l' = l e^(m - m') + sum_j e^(s - m')    a' = a e^(m - m') + sum_j e^(s - m') v_j

and at the end `out = a / l`, `lse = m + log l`. The backward pass makes the tiles again from `p = e^(s - lse)`:

    dv_j += p^T do_i      ds = p (do_i v_j^T - delta_i)      delta = sum_h do out - dlse
    dq_i += ds k_j        dk_j += ds^T q_i                   dlog_beta_j += sum_t ds (t - i)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

LARGEST_BLOCK = 128  # tokens: of 64 to 512 the fastest on a CPU core at T = 2048, whose tiles then stay in its cache
ROUND = 8  # block sizes are multiples of it: vector lanes


def block_size(length: int) -> int:
    """Tokens in a block: as few blocks as `LARGEST_BLOCK` allows, all of nearly equal fill."""
    blocks = -(-length // LARGEST_BLOCK)
    return -(-length // (blocks * ROUND)) * ROUND


class Blocks(NamedTuple):
    """The inputs cut into n blocks of R tokens, block axis first; `K` heads lie next to the batch, G R query rows."""

    q: Float[Array, "n B K GR H"]
    k: Float[Array, "n B K R H"]
    v: Float[Array, "n B K R H"]
    log_beta: Float[Array, "n B K R"]
    segment: Int[Array, "n B R"]
    window: Int[Array, ""] | None  # keys this many tokens old or older are not seen


def _split(x: Num[Array, "B T *rest"], block: int) -> Num[Array, "n B R *rest"]:
    pad = -x.shape[1] % block
    # A padded row sees itself, so its softmax is finite, and real rows come before it, so they never see it.
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _join(x: Num[Array, "n B R *rest"], length: int) -> Num[Array, "B T *rest"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _split_heads(x: Float[Array, "B T heads H"], groups: int, block: int) -> Float[Array, "n B K GR H"]:
    n_b_r = _split(x.reshape(*x.shape[:2], -1, groups, x.shape[-1]), block)
    n, B, R, K, G, H = n_b_r.shape
    return n_b_r.transpose(0, 1, 3, 4, 2, 5).reshape(n, B, K, G * R, H)


def _join_heads(x: Float[Array, "n B K GR *H"], groups: int, length: int) -> Float[Array, "B T heads *H"]:
    n, B, K, GR, *rest = x.shape
    x = jnp.moveaxis(x.reshape(n, B, K, groups, GR // groups, *rest), 4, 2)
    return _join(x, length).reshape(B, length, K * groups, *rest)


def _blocks(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, block: int
) -> Blocks:
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    dtype = np.promote_types(q.dtype, np.float32)
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on it is as good as -inf: e^logit is exactly 0.
    log_beta = jnp.maximum(log_beta.astype(dtype), float(jnp.finfo(dtype).min) / (2 * T))
    log_beta = _split(log_beta.swapaxes(1, 2), block).swapaxes(2, 3)
    return Blocks(
        _split_heads(q, G, block),
        _split_heads(k, 1, block),
        _split_heads(v, 1, block),
        log_beta,
        _split(segment_ids, block),
        window,
    )


def visible_pairs(n: int) -> Int[Array, "pairs 2"]:
    """Pairs of blocks (i, j <= i). A row's own block comes first: from then on its running maximum is finite."""
    return jnp.array([(i, j) for i in range(n) for j in range(i, -1, -1)], jnp.int32)


def over_visible_pairs(step: Callable[[Any, Array], Any], state: Any, blocks: int) -> Any:
    """Folds `step(state, pair)` over `visible_pairs(blocks)`.

    A while loop, not a scan: of a scan within a differentiated layer, JAX computes beforehand what does not depend on
    differentiated values, here every pair's mask and ages, and keeps them, T x T in all.
    """
    pairs = visible_pairs(blocks)

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        at, state = carry
        return at + 1, step(state, pairs[at])

    return lax.while_loop(lambda carry: carry[0] < len(pairs), body, (jnp.int32(0), state))[1]


def _can_see(x: Blocks, i: Array, j: Array) -> Array:
    """Whether block i can see block j in some row: their ranges of segment ids overlap, and the window reaches it."""
    a, b = x.segment[i], x.segment[j]
    overlap = jnp.any((a.min(-1) <= b.max(-1)) & (b.min(-1) <= a.max(-1)))
    return overlap if x.window is None else overlap & ((i - j - 1) * a.shape[-1] + 1 < x.window)


def _tile(x: Blocks, i: Array, j: Array) -> tuple[Array, Array, Array, Array]:
    """Scaled queries [B K GR H], keys [B K R H], logits [B K G R R] and ages [R R] of one pair, in the wide dtype."""
    dtype = x.log_beta.dtype
    B, K, R = x.log_beta.shape[1:]
    q, k = x.q[i].astype(dtype) * x.q.shape[-1] ** -0.5, x.k[j].astype(dtype)
    index = jnp.arange(R, dtype=jnp.int32)
    age = (i - j) * R + index[:, None] - index[None, :]
    in_reach = age >= 0 if x.window is None else (age >= 0) & (age < x.window)
    visible = in_reach[None] & (x.segment[i][:, :, None] == x.segment[j][:, None, :])
    logits = jnp.einsum("bkth,bkih->bkti", q, k).reshape(B, K, -1, R, R)
    logits = logits + (age.astype(dtype)[None, None] * x.log_beta[j][:, :, None, :])[:, :, None]
    return q, k, jnp.where(visible[:, None, None], logits, -jnp.inf), age


def _forward_tile(x: Blocks, i: Array, j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    m, l, acc = state  # [B K GR] [B K GR] [B K GR H]
    logits = _tile(x, i, j)[2].reshape(*m.shape, -1)
    m_new = jnp.maximum(m, logits.max(-1))
    p = jnp.exp(logits - m_new[..., None])
    shrink = jnp.exp(m - m_new)
    acc = acc * shrink[..., None] + jnp.einsum("bkti,bkih->bkth", p, x.v[j].astype(p.dtype))
    return m_new, l * shrink + p.sum(-1), acc


def _forward(x: Blocks) -> tuple[Float[Array, "n B K GR H"], Float[Array, "n B K GR"]]:
    dtype = x.log_beta.dtype

    def step(state: Any, pair: Array) -> Any:
        i, j = pair
        row = jax.tree.map(lambda s: s[i], state)
        row = lax.cond(_can_see(x, i, j), lambda row: _forward_tile(x, i, j, row), lambda row: row, row)
        return jax.tree.map(lambda s, r: s.at[i].set(r), state, row)

    rows = x.q.shape[:-1]
    state = (jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), jnp.zeros(x.q.shape, dtype))
    m, l, acc = over_visible_pairs(step, state, len(x.q))
    return acc / l[..., None], m + jnp.log(l)


def _backward_tile(x: Blocks, do: Array, lse: Array, delta: Array, i: Array, j: Array) -> tuple[Array, ...]:
    """What one pair adds to dq_i, dk_j, dv_j and dlog_beta_j."""
    q, k, logits, age = _tile(x, i, j)
    B, K, G, R, _ = logits.shape
    do = do[i]
    p = jnp.exp(logits - lse[i].reshape(B, K, G, R, 1))
    dp = jnp.einsum("bkth,bkih->bkti", do, x.v[j].astype(do.dtype))
    ds = p * (dp.reshape(p.shape) - delta[i].reshape(B, K, G, R, 1))
    dlog_beta = jnp.einsum("bkgti,ti->bki", ds, age.astype(ds.dtype))
    p, ds = p.reshape(dp.shape), ds.reshape(dp.shape)
    return (
        jnp.einsum("bkti,bkih->bkth", ds, k) * q.shape[-1] ** -0.5,
        jnp.einsum("bkti,bkth->bkih", ds, q),
        jnp.einsum("bkti,bkth->bkih", p, do),
        dlog_beta,
    )


def _backward(x: Blocks, do: Array, lse: Array, delta: Array) -> tuple[Array, ...]:
    dtype = x.log_beta.dtype

    def step(grads: Any, pair: Array) -> Any:
        i, j = pair
        places = (i, j, j, j)
        old = tuple(g[at] for g, at in zip(grads, places, strict=True))
        new = lax.cond(
            _can_see(x, i, j),
            lambda old: jax.tree.map(jnp.add, old, _backward_tile(x, do, lse, delta, i, j)),
            lambda old: old,
            old,
        )
        return tuple(g.at[at].set(n) for g, at, n in zip(grads, places, new, strict=True))

    zeros = tuple(jnp.zeros(a.shape, dtype) for a in (x.q, x.k, x.v, x.log_beta))
    return over_visible_pairs(step, zeros, len(x.q))


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
    out, lse = _join_heads(out, N // K, T), _join_heads(lse, N // K, T)
    # The residual `out` stays wide: rounded to bfloat16 it would cost log_beta's float32 gradient its last 16 bits.
    return (out.astype(q.dtype), lse.swapaxes(1, 2)), (q, k, v, log_beta, segment_ids, window, out, lse)


def _attention_bwd(block: int, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, log_beta, segment_ids, window, out, lse = residuals
    (_, T, N, _), K = q.shape, k.shape[2]
    do, dlse = cotangents[0].astype(out.dtype), cotangents[1].swapaxes(1, 2)
    delta = (do * out).sum(-1) - dlse
    rows = [_split_heads(a, N // K, block) for a in (do, lse[..., None], delta[..., None])]
    dq, dk, dv, dlog_beta = _backward(
        _blocks(q, k, v, log_beta, segment_ids, window, block), rows[0], rows[1][..., 0], rows[2][..., 0]
    )
    dlog_beta = _join(dlog_beta.swapaxes(2, 3), T).swapaxes(1, 2)
    return (
        _join_heads(dq, N // K, T).astype(q.dtype),
        _join_heads(dk, 1, T).astype(k.dtype),
        _join_heads(dv, 1, T).astype(v.dtype),
        dlog_beta.astype(log_beta.dtype),
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

    A `window` costs nothing where there is none, and saves the blocks out of its reach where there is.

    Memory grows with T, not T^2, forward and backward; gradients reach q, k, v and log_beta.

    Raises:
      ValueError: if N is not a multiple of K.
    """
    return retention_attention_with_lse(q, k, v, log_beta, segment_ids, window)[0]

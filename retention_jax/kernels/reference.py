"""What every operation of the package computes, in plain jnp and in one piece: every query beside every key, every
entry beside every other. Easy to read, slow on purpose.

Kernels are tested against these functions, and these functions against numbers worked by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from retention_jax.kernels.buffer_attention_xla import Window
from retention_jax.kernels.partial_softmax import Partial


def _age(length: int) -> Int[Array, "T T"]:
    """`age[t, i] = t - i`, in tokens."""
    index = jnp.arange(length, dtype=jnp.int32)
    return index[:, None] - index[None, :]


def _visible(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether token t may look at token i: not later, and in the same document."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & (_age(segment_ids.shape[1]) >= 0)[None]


def _decay(log_beta: Float[Array, "B heads T"]) -> Float[Array, "B heads T T"]:
    """`(t - i) * log_beta_i`, what is left of entry i at token t, as a logarithm; only for i <= t."""
    age = _age(log_beta.shape[-1])[None, None]
    # An entry is whole when it is made, even with log_beta = -inf, where the product is nan.
    return jnp.where(age > 0, age.astype(log_beta.dtype) * log_beta[:, :, None, :], 0.0)


def retention_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents, in which every key fades with age (arXiv 2512.03324).

    `logit[t, i] = q_t . k_i * H^-0.5 + (t - i) * log_beta_i`; query head n reads key/value head `n // (N / K)`.
    `log_beta <= 0` is the log of what is kept per token: 0 is ordinary attention, -inf hides a key from all but its own
    token. Tokens see each other where `segment_ids` are equal and, with a `window`, less than that many tokens apart.
    Sums are in float32 or wider; the result has q's dtype.

    Raises:
      ValueError: if N is not a multiple of K.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    if N % K:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {N} and {K}")
    out_dtype, dtype = q.dtype, np.promote_types(q.dtype, np.float32)
    q, k, v, log_beta = (x.astype(dtype) for x in (q, k, v, log_beta))
    logits = jnp.einsum("btkgh,bikh->bkgti", q.reshape(B, T, K, N // K, H), k) * H**-0.5
    logits = logits + _decay(log_beta)[:, :, None]
    visible = _visible(segment_ids)
    if window is not None:
        visible = visible & (_age(T) < window)[None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgti,bikh->btkgh", weights, v)
    return out.reshape(B, T, N, H).astype(out_dtype)


def retention_mass(log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `S[t] = sum_{i <= t, same document} exp((t - i) log_beta_i)`.

    From 1 (the token itself, always whole) to the number of tokens of the document so far; the capacity loss compares
    it with the budget (arXiv 2605.09649).
    """
    decay = _decay(log_beta)
    return jnp.exp(jnp.where(_visible(segment_ids)[:, None], decay, -jnp.inf)).sum(-1)


def select_top(
    score: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    live: Bool[Array, "B E"],
    *,
    capacity: int | Int[Array, "B groups"],
    groups: int,
    heads_of_group: int,
) -> Bool[Array, "B E"]:
    """The `capacity` best live entries of each group of `heads_of_group` heads, of which there are `groups`.

    The higher score is better; then the newer token, then the lower head. All live entries stay where the capacity
    is not reached.
    """
    group = head // heads_of_group
    one, other = (lambda a: a[:, :, None]), (lambda a: a[:, None, :])
    better = (other(score) > one(score)) | (
        (other(score) == one(score))
        & ((other(pos) > one(pos)) | ((other(pos) == one(pos)) & (other(head) < one(head))))
    )
    rank = (better & other(live) & (other(group) == one(group))).sum(axis=2)
    room = jnp.broadcast_to(jnp.asarray(capacity), (score.shape[0], groups))
    return live & (rank < jnp.take_along_axis(room, group, axis=1))


def pack(
    keep: Bool[Array, "B E"],
    head: Int[Array, "B E"],
    pool: Shaped[Array, "B S *H"],
    recent: Shaped[Array, "B heads_recent *H"],
    heads: int,
) -> tuple[Shaped[Array, "B S *H"], Int[Array, "B heads_and_1"]]:
    """The survivors of pool and recent entries side by side, and where each head begins among them.

    Heads come one after the other, and in each the pool's survivors before the recent ones, in the order they had.
    Entries of the pool are older than recent ones, so a head stays in order of position. Slots behind the last survivor
    are 0.
    """
    of_head = keep[:, :, None] & (head[:, :, None] == jnp.arange(heads, dtype=jnp.int32)[None, None])
    offset = jnp.pad(jnp.cumsum(of_head.sum(axis=1, dtype=jnp.int32), axis=1), ((0, 0), (1, 0)))
    order = jnp.argsort(jnp.where(keep, head, heads), axis=1)[:, : pool.shape[1]]  # stable
    rows = jax.vmap(lambda a, at: a[at])(jnp.concatenate([pool, recent], axis=1), order)
    used = jnp.arange(pool.shape[1], dtype=jnp.int32)[None] < offset[:, -1:]
    return jnp.where(used.reshape(used.shape + (1,) * (rows.ndim - 2)), rows, jnp.zeros((), rows.dtype)), offset


def score_and_evict(
    log_beta: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    live: Bool[Array, "B E"],
    seen: Int[Array, " B"],
    pool: Shaped[Array, "B S *H"],
    recent: Shaped[Array, "B heads_recent *H"],
    heads: int,
) -> tuple[Shaped[Array, "B S *H"], Int[Array, "B heads_and_1"]]:
    """One eviction over all layers and heads together: as many entries stay as the pool has slots (arXiv 2605.09649).

    An entry's score is age * log_beta, with age = seen + 1 - pos. The E entries are the pool's S slots, then the recent
    tokens of each head; `pool` and `recent` are one array of theirs, such as keys. Returns as `pack` does.
    """
    score = (seen[:, None] + 1 - pos).astype(log_beta.dtype) * log_beta
    keep = select_top(score, pos, head, live, capacity=pool.shape[1], groups=1, heads_of_group=heads)
    return pack(keep, head, pool, recent, heads)


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
    """Attention of new tokens over what their key/value head holds in one layer, the new tokens not included.

    `logit = q . k * H^-0.5`. Head h of the layer holds the pool's slots from `offset[h]` up to before `offset[h + 1]`,
    and of its recent tokens those from `recent_range[0]` up to before `recent_range[1]`. With a `window` a query sees
    keys that are less than `window.size` tokens older than itself. Sums are in float32 or wider.
    """
    (B, T, N, H), (K, R), S = q.shape, recent_k.shape[2:4], pool_k.shape[1]
    index = lambda size: jnp.arange(size, dtype=jnp.int32)[None]
    by_head = lambda pool, recent: jnp.concatenate(
        [jnp.broadcast_to(pool[:, None], (B, K, S, H)), recent[:, layer]], axis=2
    ).astype(np.promote_types(q.dtype, np.float32))
    k, v = by_head(pool_k, recent_k), by_head(pool_v, recent_v)
    in_pool = (index(S)[None] >= offset[:, :-1, None]) & (index(S)[None] < offset[:, 1:, None])
    in_recent = (index(R) >= recent_range[:, :1]) & (index(R) < recent_range[:, 1:])
    in_recent = jnp.broadcast_to(in_recent[:, None], (B, K, R))
    visible = jnp.concatenate([in_pool, in_recent], axis=2)[:, :, None]
    if window is not None:
        pos = jnp.concatenate([window.pool_pos, window.recent_pos[:, None] + index(R)], axis=1)
        age = window.seen[:, None, None] + index(T)[:, :, None] - pos[:, None]
        visible = visible & (age < window.size)[:, None]
    logits = jnp.einsum("btkgh,bkeh->bkgte", q.reshape(B, T, K, N // K, H).astype(k.dtype), k) * H**-0.5
    logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])  # no key: all 0
    out = jnp.einsum("bkgte,bkeh->btkgh", weights, v)
    return Partial(out.reshape(B, T, N, H), lse.transpose(0, 3, 1, 2).reshape(B, T, N))

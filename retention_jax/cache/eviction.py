"""What changes a buffer: one new token a row, a chunk of new tokens, and the eviction that both lead to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from retention_jax.cache import selection
from retention_jax.cache.buffer import Buffer, Entries, on_every_device, window_sizes
from retention_jax.config import CacheConfig
from retention_jax.kernels import ops
from retention_jax.policies import table


class Queries(NamedTuple):
    """Queries since the last eviction."""

    q: Float[Array, "B L Q N H"]
    pos: Int[Array, "B Q"]  # -1: none


def append(
    buffer: Buffer, new: Entries, active: Bool[Array, " B"], queries: Float[Array, "B L 1 N H"] | None = None
) -> Buffer:
    """Writes one new token a row behind the recent tokens of the active rows.

    `new` is [B, L, K, 1, ...] as `decoder.extend` hands it back; its `stat` is log_beta.

    Raises:
      ValueError: without the tokens' `queries` where the policy needs them, and if it needs to know the future.
    """
    _check_what_is_known(buffer, queries, None)
    return on_every_device(_append, buffer, _carrying(buffer.config, new, prompt=False), active, queries)


def _check_what_is_known(buffer: Buffer, queries: Array | None, outlook: Array | None) -> None:
    policy = buffer.config.policy
    if buffer.config.row.needs_future and outlook is None:
        raise ValueError(f"policy {policy!r} needs to know the future: only scores of whole sequences can tell it")
    if buffer.queries is not None and queries is None:
        raise ValueError(f"policy {policy!r} needs the queries of new tokens")


def _append(
    buffer: Buffer, new: Entries, active: Bool[Array, " B"], queries: Float[Array, "B L 1 N H"] | None
) -> Buffer:
    def write(old: Shaped[Array, "B L K R *H"], one: Shaped[Array, "B L K 1 *H"]) -> Shaped[Array, "B L K R *H"]:
        # An inactive row writes behind its live tokens, where nothing is read.
        return jax.vmap(lambda o, n, at: jax.lax.dynamic_update_slice_in_dim(o, n, at, axis=2))(
            old, one, buffer.recent_len
        )

    step, ring = active.astype(jnp.int32), buffer.queries
    if ring is not None and queries is not None:

        def turn(old, one, at, active):
            there = jax.lax.dynamic_slice_in_dim(old, at, 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(active, one, there), at, axis=1)

        ring = jax.vmap(turn)(ring, queries, buffer.seen % ring.shape[2], active)
    return buffer._replace(
        queries=ring,
        recent=Entries(*(write(old, one) for old, one in zip(buffer.recent, new, strict=True))),
        recent_len=buffer.recent_len + step,
        seen=buffer.seen + step,
    )


def take_in(
    buffer: Buffer,
    new: Entries,
    valid: Bool[Array, "B C"],
    queries: Float[Array, "B L Q N H"] | None = None,
    outlook: Float[Array, "B L K all"] | None = None,
    *,
    prompt: bool,
) -> Buffer:
    """Merges a chunk of new tokens, [B, L, K, C, ...], and the recent tokens before it into the pool.

    Padding (not `valid`, at the end of a row) never enters; a row without a valid token stays as it is.

    Args:
      buffer: what is remembered so far.
      new: the chunk's entries as `decoder.extend` hands them back; `stat` is their log_beta.
      valid: which tokens are real.
      queries: each row's newest, as `decoder.extend` hands them back, for policies that ask for them.
      outlook: what each position of the sequence is still worth afterwards, for policies that must know the future.
      prompt: whether the tokens are of a prompt, which some policies keep.

    Raises:
      ValueError: without queries or outlook where the policy needs them.
    """
    _check_what_is_known(buffer, queries, outlook)
    new = _carrying(buffer.config, new, prompt)
    return on_every_device(_take_in, buffer, new, valid, queries, outlook)


def _carrying(config: CacheConfig, new: Entries, prompt: bool) -> Entries:
    """New entries with what the policy wants them to carry in place of their log_beta."""
    return new._replace(stat=config.row.carry(new.stat, prompt))


def _take_in(
    buffer: Buffer,
    new: Entries,
    valid: Bool[Array, "B C"],
    queries: Float[Array, "B L Q N H"] | None,
    outlook: Float[Array, "B L K all"] | None,
) -> Buffer:
    held_queries = _recent_queries(buffer)
    if held_queries is not None and queries is not None:
        # Of each row's valid tokens the last ones: the first Q where there are no more.
        count, index = valid.sum(axis=1, dtype=jnp.int32)[:, None], jnp.arange(queries.shape[2], dtype=jnp.int32)[None]
        at = jnp.maximum(count - queries.shape[2], 0) + index
        pos = jnp.where(at < count, buffer.seen[:, None] + at, -1)
        both = jnp.concatenate([held_queries.q, queries], axis=2), jnp.concatenate([held_queries.pos, pos], axis=1)
        held_queries = Queries(*both)
    recent_live = jnp.arange(buffer.config.recent)[None] < buffer.recent_len[:, None]
    fresh = Entries(*(jnp.concatenate(pair, axis=3) for pair in zip(buffer.recent, new, strict=True)))
    buffer = buffer._replace(seen=buffer.seen + valid.sum(axis=1, dtype=jnp.int32))
    live = jnp.concatenate([recent_live, valid], axis=1)
    return merge(buffer, fresh, live, rows=valid.any(axis=1), held_queries=held_queries, outlook=outlook)


def _recent_queries(buffer: Buffer) -> Queries | None:
    """The queries of the recent tokens. Slot j of the ring has the newest position p with p % size = j, if any."""
    if buffer.queries is None:
        return None
    slot, size, seen = jnp.arange(buffer.queries.shape[2], dtype=jnp.int32), buffer.queries.shape[2], buffer.seen
    pos = seen[:, None] - 1 - (seen[:, None] - 1 - slot[None]) % size
    return Queries(buffer.queries, jnp.where(pos >= (seen - buffer.recent_len)[:, None], pos, -1))


def evict_full(buffer: Buffer) -> Buffer:
    """Merges the recent tokens into the pool in rows where there is no place for more; other rows stay as they are."""
    return on_every_device(_evict_full, buffer)


def _evict_full(buffer: Buffer) -> Buffer:
    full = buffer.recent_len == buffer.config.recent
    live = jnp.broadcast_to(full[:, None], (full.shape[0], buffer.config.recent))
    return merge(buffer, buffer.recent, live, rows=full, held_queries=_recent_queries(buffer))


def merge(
    buffer: Buffer,
    fresh: Entries,
    fresh_live: Bool[Array, "B fresh"],
    rows: Bool[Array, " B"],
    held_queries: Queries | None = None,
    outlook: Float[Array, "B L K all"] | None = None,
) -> Buffer:
    """Scores the pool and the live part of `fresh` tokens, keeps the best, and packs them, in the rows named.

    `fresh` are tokens of every head, [B, L, K, tokens], that are not in the pool yet.
    """
    cfg = buffer.config
    B, L, K, count = fresh.pos.shape
    heads, slots = L * K, buffer.pool.pos.shape[1]
    flat = Entries(*(a.reshape(B, heads * count, *a.shape[4:]) for a in fresh))

    pool_head, pool_live = ops.slot_heads(buffer.offset, slots)
    joined = lambda pool, other: jnp.concatenate([pool, jnp.broadcast_to(other, (B, heads * count))], axis=1)
    head = joined(pool_head, jnp.repeat(jnp.arange(heads, dtype=jnp.int32), count)[None])
    live = joined(pool_live, jnp.tile(fresh_live & rows[:, None], (1, heads)))
    pos = joined(buffer.pool.pos, flat.pos)
    if cfg.row.scope == "all":
        entries = table.Everything(joined(buffer.pool.stat, flat.stat), pos, head, buffer.seen, outlook)
        score, stat = cfg.row.score(cfg.options, entries)
    else:
        score, stat = _layer_scores(buffer, fresh, fresh_live & rows[:, None], held_queries)
    kept = jnp.where(rows[:, None], stat[:, :slots], buffer.pool.stat)
    buffer, flat = buffer._replace(pool=buffer.pool._replace(stat=kept)), flat._replace(stat=stat[:, slots:])

    useful, sizes = live, window_sizes(buffer.windows)
    if sizes is not None:
        sees = jnp.repeat(sizes, K)[head]
        useful = live & (buffer.seen[:, None] - pos < sees)  # the next token, at position `seen`, still sees it
    keep = live & (
        selection.choose(cfg, score, pos, head, useful, buffer.seen, heads, L, shared=heads * count) | ~rows[:, None]
    )
    keep = jnp.concatenate([keep[:, :slots], selection.deal(keep[:, :slots], keep[:, slots:])], axis=1)
    order, offset = ops.pack_order(keep, head, buffer.offset, count)
    # Over the pool itself, which a caller that donates its buffer gives away.
    packed = Entries(*(ops.pack_rows(pool, other, order) for pool, other in zip(buffer.pool, flat, strict=True)))
    used = jnp.arange(slots, dtype=jnp.int32)[None] < offset[:, -1:]
    return buffer._replace(
        pool=packed._replace(pos=jnp.where(used, packed.pos, -1)),
        offset=offset,
        recent_len=jnp.where(rows, 0, buffer.recent_len),
    )


def _layer_scores(
    buffer: Buffer, fresh: Entries, fresh_live: Bool[Array, "B fresh"], held_queries: Queries | None
) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
    """Scores and statistics of pool and fresh tokens, a layer at a time, so that one layer's keys lie by head."""
    B, L, K, count = fresh.pos.shape
    slots, cfg = buffer.pool.pos.shape[1], buffer.config
    most, sizes = min(cfg.row.most_in_a_head(cfg.budget, K), slots), window_sizes(buffer.windows)

    def one_layer(l: Int[Array, ""]) -> tuple[Float[Array, "B K E"], Float[Array, "B K E"]]:
        of_layer = lambda a: jax.lax.dynamic_index_in_dim(a, l, axis=1, keepdims=False)
        bounds = jax.lax.dynamic_slice_in_dim(buffer.offset, l * K, K + 1, axis=1)
        slot = bounds[:, :-1, None] + jnp.arange(most, dtype=jnp.int32)[None, None]
        pool_live, slot = slot < bounds[:, 1:, None], jnp.minimum(slot, slots - 1)
        held = Entries(*(jax.vmap(lambda rows, at: rows[at])(a, slot) for a in buffer.pool))
        k, v, stat, pos = (jnp.concatenate([a, of_layer(b)], axis=2) for a, b in zip(held, fresh, strict=True))
        live = jnp.concatenate([pool_live, jnp.broadcast_to(fresh_live[:, None], (B, K, count))], axis=2)
        size = None if sizes is None else sizes[l]
        q, query_pos = (None, None) if held_queries is None else (of_layer(held_queries.q), held_queries.pos)
        pos = jnp.where(live, pos, -1)
        return cfg.row.score(cfg.options, table.OneLayer(k, v, stat, pos, buffer.seen, q, query_pos, size))

    by_layer = jax.lax.map(one_layer, jnp.arange(L, dtype=jnp.int32))
    head, _ = ops.slot_heads(buffer.offset, slots)
    index = jnp.arange(slots, dtype=jnp.int32)[None] - jnp.take_along_axis(buffer.offset, head, axis=1)
    index = head * most + jnp.clip(index, 0, most - 1)

    def flat(a: Float[Array, "L B K E"]) -> Float[Array, "B flat"]:
        a = a.swapaxes(0, 1).reshape(B, L * K, most + count)
        pool = jnp.take_along_axis(a[:, :, :most].reshape(B, -1), index, axis=1)
        return jnp.concatenate([pool, a[:, :, most:].reshape(B, -1)], axis=1)

    return flat(by_layer[0]), flat(by_layer[1])

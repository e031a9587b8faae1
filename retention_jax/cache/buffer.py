"""The global key/value buffer: the only place that enforces the budget.

    pool     for each sequence one flat array of L*K*M slots; head (l, h) owns slots offset[lh] : offset[lh + 1],
             lh = l*K + h, in order of position. Layers and heads own as many slots as the ranking gives them.
    recent   a dense window: every head gets every new token.

`evict` merges a window into the pool: it scores every live entry of a sequence, keeps the best L*K*M over all layers
and heads together, and packs them. Between two evictions the pool never changes, so reads are contiguous. All shapes
are static; memory is L*K*(M + R) slots at any context length.

Ties: the newer token stays; for the same token, the lower (l, h).

A layer with a sliding window never again sees an entry that has fallen out of it. Attention masks such an entry by its
position; the next eviction drops it before anything is ranked, whatever protects it, so that layers which see further
get its slot.

On a mesh, devices share the sequences out, and those that have the same sequences share their pool: n slot shards of
L*K*M / n slots, each with an `offset` of its own. Windows are whole on all of them. Attention over a shard's slots is a
part of a softmax, and parts are merged; `selection.deal` tells how evictions stay exact. Every function below runs on
each device as if the shard were all, but for what `slot_shards` says.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from retention_jax import policies
from retention_jax.cache import selection
from retention_jax.config import CacheConfig, ModelConfig
from retention_jax.kernels import ops, slot_shards
from retention_jax.kernels.partial_softmax import Partial
from retention_jax.parallel import sharding

jax.tree_util.register_static(CacheConfig)


class Windows(tuple[int, ...]):
    """Tokens that each layer sees, the newest included. Static."""


jax.tree_util.register_static(Windows)


class Entries(NamedTuple):
    """Cached tokens: `axes` is [B, slots] in the pool and [B, L, K, tokens] in a window. Unused slots have pos -1."""

    k: Float[Array, "*axes H"]
    v: Float[Array, "*axes H"]
    stat: Float[Array, "*axes"]  # what an entry carries for the policy: `policies.carried`
    pos: Int[Array, "*axes"]


class Buffer(NamedTuple):
    """What is remembered of B sequences."""

    pool: Entries
    offset: Int[Array, "B shards_of_heads_and_1"]
    recent: Entries
    recent_len: Int[Array, " B"]  # live tokens in `recent`; always the newest ones of the sequence
    seen: Int[Array, " B"]  # tokens processed so far
    queries: Float[Array, "B L Q N H"] | None  # the newest, in a ring, for policies that ask for them
    windows: Windows | None  # static; None where all layers see everything
    config: CacheConfig  # static

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, used or not: L*K*(M + R) times the size of a key, a value, a statistic and a position.

        Queries are counted too, for policies that ask for them.
        On a mesh, beside this, every slot shard but one has a copy of the recent windows.
        """
        return sum(a.nbytes for a in jax.tree.leaves((self.pool, self.recent, self.queries)))

    @property
    def shards(self) -> int:
        """Into how many slot shards the pool is cut."""
        L, K = self.recent.pos.shape[1:3]
        return self.offset.shape[1] // (L * K + 1)

    @property
    def live(self) -> Int[Array, " B"]:
        """Live entries of each row, pool and recent window together."""
        L, K = self.recent.pos.shape[1:3]
        in_pool = self.offset[:, L * K :: L * K + 1].sum(axis=1, dtype=jnp.int32)
        return in_pool + L * K * self.recent_len

    def positions(self, row: int) -> list[list[np.ndarray]]:
        """Kept positions of one row: a list over layers of a list over key/value heads of sorted integers."""
        L, K = self.recent.pos.shape[1:3]
        arrays = (self.offset, self.pool.pos, self.recent.pos, self.recent_len)
        offset, pool, recent, recent_len = (sharding.on_host(a)[row] for a in arrays)
        shards = list(zip(offset.reshape(self.shards, -1), pool.reshape(self.shards, -1), strict=True))
        of_head = lambda i: [pos[begin[i] : begin[i + 1]] for begin, pos in shards] + [recent[0, 0, :recent_len]]
        kept = [np.sort(np.concatenate(of_head(i))) for i in range(L * K)]
        return [kept[l * K : (l + 1) * K] for l in range(L)]


def empty(model: ModelConfig, cache: CacheConfig, batch: int) -> Buffer:
    """A buffer that has seen nothing, laid out on the ambient mesh if there is one.

    Raises:
      ValueError: where the mesh does not divide the batch or the pool.
    """
    slots = model.num_layers * model.num_kv_heads * cache.budget
    row_parts, slot_parts = sharding.shards(*sharding.ROWS), sharding.shards(*sharding.SLOTS)
    problems = []
    if batch % row_parts:
        problems.append(f"the batch must be a multiple of mesh data * fsdp = {row_parts}, got {batch}")
    if slots % slot_parts:
        problems.append(
            f"layers * key/value heads * budget must be a multiple of mesh context * tensor = {slot_parts}, got "
            f"{model.num_layers} * {model.num_kv_heads} * {cache.budget} = {slots}"
        )
    if slot_parts > 1 and policies.by_layer(cache):
        problems.append(f"policy {cache.policy!r} needs whole heads: mesh context * tensor must be 1, got {slot_parts}")
    if problems:
        raise ValueError("buffer: " + "; ".join(problems))
    return _empty(model, cache, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(model: ModelConfig, cache: CacheConfig, batch: int) -> Buffer:
    """Compiled, so that no device ever holds more than its parts."""
    L, K, H = model.num_layers, model.num_kv_heads, model.head_size

    def entries(*axes: int) -> Entries:
        zeros = lambda: jnp.zeros((*axes, H), model.dtype)  # k and v must not be one buffer: both are donated
        return Entries(zeros(), zeros(), jnp.zeros(axes, jnp.float32), jnp.full(axes, -1, jnp.int32))

    votes = policies.queries_kept(cache, cache.recent)
    buffer = Buffer(
        pool=entries(batch, L * K * cache.budget),
        offset=jnp.zeros((batch, sharding.shards(*sharding.SLOTS) * (L * K + 1)), jnp.int32),
        recent=entries(batch, L, K, cache.recent),
        recent_len=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros(batch, jnp.int32),
        queries=jnp.zeros((batch, L, votes, model.num_heads, H), model.dtype) if votes else None,
        windows=None if model.windows is None else Windows(model.windows),
        config=cache,
    )
    return _on_every_device(lambda buffer: buffer, buffer)


def layout(buffer: Buffer) -> Buffer:
    """The rows of the table that a buffer's parts are laid out by.

    Raises:
      ValueError: if the ambient mesh has another number of slot shards than the buffer was made for.
    """
    if buffer.shards != (shards := sharding.shards(*sharding.SLOTS)):
        raise ValueError(f"the buffer was made for {buffer.shards} slot shards, but the mesh has {shards}")
    pool, window = sharding.POOL, sharding.WINDOW
    return buffer._replace(pool=pool, offset=pool, recent=window, recent_len=window, seen=window, queries=window)


def _on_every_device(function: Callable[..., Buffer], buffer: Buffer, *by_row: Entries | Array | None) -> Buffer:
    """`function(buffer, *by_row)` over the ambient mesh: every device gets its rows, and its shard of their pools."""
    parts = layout(buffer)
    return sharding.mapped(function, (parts, *(sharding.WINDOW for _ in by_row)), parts)(buffer, *by_row)


def attend(buffer: Buffer, q: Float[Array, "B T N H"], layer: Int[Array, ""]) -> Partial:
    """Attention of new tokens over all that one layer holds."""
    parts = (layout(buffer), sharding.WINDOW, sharding.P())
    return sharding.mapped(_attend, parts, sharding.WINDOW)(buffer, q, layer)


def _attend(buffer: Buffer, q: Float[Array, "B T N H"], layer: Int[Array, ""]) -> Partial:
    """The shards share the recent window's tokens out, so that all have the same to read."""
    K, R = buffer.recent.pos.shape[2:]
    here = -(-R // slot_shards.count())
    end = jnp.minimum(buffer.recent_len, (slot_shards.index() + 1) * here)
    begin = jnp.minimum(slot_shards.index() * here, end)
    window = None
    if buffer.windows is not None:
        size = jnp.asarray(buffer.windows, jnp.int32)[layer]
        window = ops.Window(size, buffer.seen, buffer.seen - buffer.recent_len, buffer.pool.pos)
    return slot_shards.merge(
        ops.buffer_attention(
            q,
            pool_k=buffer.pool.k,
            pool_v=buffer.pool.v,
            offset=jax.lax.dynamic_slice_in_dim(buffer.offset, layer * K, K + 1, axis=1),
            recent_k=buffer.recent.k,
            recent_v=buffer.recent.v,
            recent_range=jnp.stack([begin, end], axis=1),
            layer=layer,
            window=window,
        )
    )


def append(
    buffer: Buffer, new: Entries, active: Bool[Array, " B"], queries: Float[Array, "B L 1 N H"] | None = None
) -> Buffer:
    """Writes one new token per row, [B, L, K, 1, ...], behind the recent window of the active rows.

    Raises:
      ValueError: without the tokens' `queries` where the policy needs them, and if it needs to know the future.
    """
    _check_what_is_known(buffer, queries, None)
    return _on_every_device(_append, buffer, new, active, queries)


def _check_what_is_known(buffer: Buffer, queries: Array | None, outlook: Array | None) -> None:
    policy = buffer.config.policy
    if policy == "oracle" and outlook is None:
        raise ValueError("policy 'oracle' needs to know the future: only score_stream can tell it")
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
) -> Buffer:
    """Merges a chunk of new tokens, [B, L, K, C, ...], and the recent window before it into the pool.

    Padding (not `valid`, at the end of a row) never enters; a row without a valid token stays as it is.
    `queries` are the newest of each row, as `decoder.extend` hands them back; `outlook` is what each position of the
    sequence is still worth afterwards, for the oracle.

    Raises:
      ValueError: without queries or outlook where the policy needs them.
    """
    _check_what_is_known(buffer, queries, outlook)
    return _on_every_device(_take_in, buffer, new, valid, queries, outlook)


def _take_in(
    buffer: Buffer,
    new: Entries,
    valid: Bool[Array, "B C"],
    queries: Float[Array, "B L Q N H"] | None,
    outlook: Float[Array, "B L K all"] | None,
) -> Buffer:
    asking = _asking(buffer)
    if asking is not None and queries is not None:
        # Of each row's valid tokens the last ones: the first Q where there are no more.
        count, index = valid.sum(axis=1, dtype=jnp.int32)[:, None], jnp.arange(queries.shape[2], dtype=jnp.int32)[None]
        at = jnp.maximum(count - queries.shape[2], 0) + index
        pos = jnp.where(at < count, buffer.seen[:, None] + at, -1)
        both = jnp.concatenate([asking.q, queries], axis=2), jnp.concatenate([asking.pos, pos], axis=1)
        asking = policies.Queries(*both)
    recent_live = jnp.arange(buffer.config.recent)[None] < buffer.recent_len[:, None]
    window = Entries(*(jnp.concatenate(pair, axis=3) for pair in zip(buffer.recent, new, strict=True)))
    buffer = buffer._replace(seen=buffer.seen + valid.sum(axis=1, dtype=jnp.int32))
    live = jnp.concatenate([recent_live, valid], axis=1)
    return _merge(buffer, window, live, rows=valid.any(axis=1), asking=asking, outlook=outlook)


def _asking(buffer: Buffer) -> policies.Queries | None:
    """The queries of the recent window. Slot j of the ring has the newest position that leaves j, if any does."""
    if buffer.queries is None:
        return None
    slot, size, seen = jnp.arange(buffer.queries.shape[2], dtype=jnp.int32), buffer.queries.shape[2], buffer.seen
    pos = seen[:, None] - 1 - (seen[:, None] - 1 - slot[None]) % size
    return policies.Queries(buffer.queries, jnp.where(pos >= (seen - buffer.recent_len)[:, None], pos, -1))


def evict_full(buffer: Buffer) -> Buffer:
    """Merges the recent window into the pool in the rows where it is full; the other rows stay as they are."""
    return _on_every_device(_evict_full, buffer)


def _evict_full(buffer: Buffer) -> Buffer:
    full = buffer.recent_len == buffer.config.recent
    live = jnp.broadcast_to(full[:, None], (full.shape[0], buffer.config.recent))
    return _merge(buffer, buffer.recent, live, rows=full, asking=_asking(buffer))


def _merge(
    buffer: Buffer,
    window: Entries,
    window_live: Bool[Array, "B W"],
    rows: Bool[Array, " B"],
    asking: policies.Queries | None = None,
    outlook: Float[Array, "B L K all"] | None = None,
) -> Buffer:
    """Scores the pool and the live part of a window, keeps the best, and packs them, in the rows named."""
    cfg = buffer.config
    B, L, K, W = window.pos.shape
    heads, slots = L * K, buffer.pool.pos.shape[1]
    flat = Entries(*(a.reshape(B, heads * W, *a.shape[4:]) for a in window))

    pool_head, pool_live = ops.slot_heads(buffer.offset, slots)
    joined = lambda pool, other: jnp.concatenate([pool, jnp.broadcast_to(other, (B, heads * W))], axis=1)
    head = joined(pool_head, jnp.repeat(jnp.arange(heads, dtype=jnp.int32), W)[None])
    live = joined(pool_live, jnp.tile(window_live & rows[:, None], (1, heads)))
    pos = joined(buffer.pool.pos, flat.pos)
    if policies.by_layer(cfg):
        score, stat = _layer_scores(buffer, window, window_live & rows[:, None], asking)
        kept = jnp.where(rows[:, None], stat[:, :slots], buffer.pool.stat)
        buffer, flat = buffer._replace(pool=buffer.pool._replace(stat=kept)), flat._replace(stat=stat[:, slots:])
    elif outlook is not None:
        worth, size = outlook.reshape(B, -1), outlook.shape[-1]
        score = jnp.take_along_axis(worth, head * size + jnp.clip(pos, 0, size - 1), axis=1)
    else:
        score = policies.score(cfg, joined(buffer.pool.stat, flat.stat), pos, head, buffer.seen)

    useful = live
    if buffer.windows is not None:
        sees = jnp.repeat(jnp.asarray(buffer.windows, jnp.int32), K)[head]
        useful = live & (buffer.seen[:, None] - pos < sees)  # the next token, at position `seen`, still sees it
    keep = live & (
        selection.choose(cfg, score, pos, head, useful, buffer.seen, heads, L, shared=heads * W) | ~rows[:, None]
    )
    keep = jnp.concatenate([keep[:, :slots], selection.deal(keep[:, :slots], keep[:, slots:])], axis=1)
    order, offset = ops.pack_order(keep, head, buffer.offset, W)
    # One array after the other, so that only one copy of a pool-sized array exists beside the result.
    packed = Entries(*(ops.pack_rows(pool, other, order) for pool, other in zip(buffer.pool, flat, strict=True)))
    used = jnp.arange(slots, dtype=jnp.int32)[None] < offset[:, -1:]
    return buffer._replace(
        pool=packed._replace(pos=jnp.where(used, packed.pos, -1)),
        offset=offset,
        recent_len=jnp.where(rows, 0, buffer.recent_len),
    )


def _layer_scores(
    buffer: Buffer, window: Entries, window_live: Bool[Array, "B W"], asking: policies.Queries | None
) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
    """Scores and statistics of pool and window, a layer at a time, so that one layer's keys are laid out by head."""
    B, L, K, W = window.pos.shape
    slots, most = buffer.pool.pos.shape[1], policies.most_in_a_head(buffer.config, K)
    most = min(most, slots)

    def one_layer(l: Int[Array, ""]) -> tuple[Float[Array, "B K E"], Float[Array, "B K E"]]:
        of_layer = lambda a: jax.lax.dynamic_index_in_dim(a, l, axis=1, keepdims=False)
        bounds = jax.lax.dynamic_slice_in_dim(buffer.offset, l * K, K + 1, axis=1)
        slot = bounds[:, :-1, None] + jnp.arange(most, dtype=jnp.int32)[None, None]
        pool_live, slot = slot < bounds[:, 1:, None], jnp.minimum(slot, slots - 1)
        held = Entries(*(jax.vmap(lambda rows, at: rows[at])(a, slot) for a in buffer.pool))
        k, v, stat, pos = (jnp.concatenate([a, of_layer(b)], axis=2) for a, b in zip(held, window, strict=True))
        live = jnp.concatenate([pool_live, jnp.broadcast_to(window_live[:, None], (B, K, W))], axis=2)
        size = None if buffer.windows is None else jnp.asarray(buffer.windows, jnp.int32)[l]
        q, query_pos = (None, None) if asking is None else (of_layer(asking.q), asking.pos)
        pos = jnp.where(live, pos, -1)
        return policies.layer_score(buffer.config, k, v, stat, pos, buffer.seen, q, query_pos, size)

    by_layer = jax.lax.map(one_layer, jnp.arange(L, dtype=jnp.int32))
    head, _ = ops.slot_heads(buffer.offset, slots)
    index = jnp.arange(slots, dtype=jnp.int32)[None] - jnp.take_along_axis(buffer.offset, head, axis=1)
    index = head * most + jnp.clip(index, 0, most - 1)

    def flat(a: Float[Array, "L B K E"]) -> Float[Array, "B flat"]:
        a = a.swapaxes(0, 1).reshape(B, L * K, most + W)
        pool = jnp.take_along_axis(a[:, :, :most].reshape(B, -1), index, axis=1)
        return jnp.concatenate([pool, a[:, :, most:].reshape(B, -1)], axis=1)

    return flat(by_layer[0]), flat(by_layer[1])

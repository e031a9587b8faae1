"""Exact selection and packing of survivors in plain XLA: a threshold search, a prefix sum, gathers.

Not a sort: 32 counting passes over one order-preserving integer per entry find the threshold, and the same survivors
come out on every backend. The pool is packed where it lies, part by part.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from retention_jax.kernels import slot_shards

PARTS = 16  # of a row's pool, each packed by itself
LEAST = 512  # slots of a part: smaller ones take longer than they save


def slot_heads(offset: Int[Array, "B heads_and_1"], slots: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The head that owns each pool slot (unused slots: the last head), and whether the slot is live."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    head = jax.vmap(lambda o: jnp.searchsorted(o[1:-1], slot, side="right"))(offset)
    return head.astype(jnp.int32), slot[None] < offset[:, -1:]


def order_key(score: Float[Array, "B E"]) -> UInt32[Array, "B E"]:
    """float32 to uint32 such that a < b exactly if key(a) < key(b); -0 and +0 get one key."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def select_top(
    score: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    live: Bool[Array, "B E"],
    *,
    capacity: int | Int[Array, "B groups"],
    groups: int,
    shared: int = 0,
    heads_of_group: int = 1,
) -> Bool[Array, "B E"]:
    """The `capacity` best live entries of each row (groups=1) or of each group of heads of each row.

    Ties: higher pos first, then lower head. Exactly min(live, capacity) entries a group are chosen.

    A row's entries may lie on several slot shards; the last `shared` ones are the same on all of them. The shards tell
    each other how many entries reach a threshold, and so find the one that a single device would find.
    """
    group = head if heads_of_group == 1 else head // heads_of_group
    counted = (jnp.arange(score.shape[1]) < score.shape[1] - shared)[None] | (slot_shards.index() == 0)

    def count(chosen: Bool[Array, "B E"]) -> Int[Array, "B groups"]:
        chosen = chosen & counted
        if groups == 1:
            return slot_shards.total(chosen.sum(axis=1, keepdims=True, dtype=jnp.int32))
        by_group = jax.vmap(lambda c, g: jax.ops.segment_sum(c.astype(jnp.int32), g, groups))
        return slot_shards.total(by_group(chosen, group))

    def spread(value: Shaped[Array, "B groups"]) -> Shaped[Array, "B spread"]:
        return value if groups == 1 else jnp.take_along_axis(value, group, axis=1)

    need = jnp.full((score.shape[0], groups), capacity, jnp.int32)
    keys = (order_key(score), pos.astype(jnp.uint32), ~head.astype(jnp.uint32))
    chosen, tied = jnp.zeros_like(live), live
    for name, key in zip(("score", "position", "head"), keys, strict=True):
        with jax.named_scope(f"search_by_{name}"):  # for the count of what a compiled program does
            above, tied, need = _split_at_threshold(key, tied, need, count, spread)
        chosen = chosen | above
    return chosen | tied


def _split_at_threshold(
    key: UInt32[Array, "B E"],
    candidates: Bool[Array, "B E"],
    need: Int[Array, "B groups"],
    count: Callable[[Array], Array],
    spread: Callable[[Array], Array],
) -> tuple[Bool[Array, "B E"], Bool[Array, "B E"], Int[Array, "B groups"]]:
    """Candidates above the largest key that `need` of them reach, those at it, and how many of these are needed."""
    # When all candidates fit there is nothing to search: with threshold 0 all of them are above or at it.
    bits = jnp.where(slot_shards.anywhere(jnp.any(count(candidates) > need)), 32, 0)

    def raise_threshold(i, threshold):
        higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = count(candidates & (key >= spread(higher))) >= need
        return jnp.where(enough, higher, threshold)

    threshold = spread(jax.lax.fori_loop(0, bits, raise_threshold, jnp.zeros(need.shape, jnp.uint32)))
    above = candidates & (key > threshold)
    return above, candidates & (key == threshold), need - count(above)


def targets(
    keep: Bool[Array, "B E"], offset: Int[Array, "B heads_and_1"], window: int
) -> tuple[Int[Array, "B S"], Int[Array, "B heads_window"], Int[Array, "B heads_and_1"]]:
    """The slot that each entry of the pool and of the windows gets if it survives, and the new offsets.

    A slot that does not survive has the number of survivors before it, so the numbers of each part ascend.
    """
    B, heads = offset.shape[0], offset.shape[1] - 1
    slots = keep.shape[1] - heads * window
    in_pool, in_window = keep[:, :slots], keep[:, slots:].reshape(B, heads, window)
    running = lambda a, axis=1: jnp.cumsum(a, axis=axis, dtype=jnp.int32)

    before = jnp.pad(running(in_pool), ((0, 0), (1, 0)))
    at_offset = jnp.take_along_axis(before, offset, axis=1)  # pool survivors before each head
    from_pool = at_offset[:, 1:] - at_offset[:, :-1]
    from_window = in_window.sum(axis=2, dtype=jnp.int32)
    new_offset = jnp.pad(running(from_pool + from_window), ((0, 0), (1, 0)))

    # A head's pool survivors come after the window survivors of all heads before it.
    added = jax.vmap(lambda o, n: jnp.zeros(slots, jnp.int32).at[o].add(n, mode="drop"))(offset[:, 1:], from_window)
    to_pool = before[:, :-1] + running(added)
    to_window = (new_offset[:, :-1] + from_pool)[:, :, None] + running(in_window, 2) - in_window.astype(jnp.int32)
    return to_pool, to_window.reshape(B, -1), new_offset


class Order(NamedTuple):
    """How a pool is packed where it lies."""

    source: Int[Array, "B S"]  # where each slot's next content comes from; -1: nothing
    parts: Int[Array, "B parts"]  # the order in which parts of a row are written


def part_size(slots: int) -> int:
    """Slots that are packed at a time."""
    return min(slots, max(LEAST, -(-slots // PARTS)))


def order_of_parts(first: Int[Array, "B parts"], size: int) -> Int[Array, "B parts"]:
    """The order in which parts of `size` slots can be written so that none is overwritten that is still to be read.

    Survivors keep their order. So what comes to lie from a part's begin on is now at slot `first` or behind it, and
    what comes to lie before it is now before `first`. Where `first` is before the begin, the part must be written
    before the one in front of it, otherwise it may be written behind it. So of parts that move back, each run of
    neighbours is written from its end, and the runs one after the other.
    """
    parts = first.shape[1]
    index = jnp.arange(parts, dtype=jnp.int32)[None]
    moves_back = (first < index * size) & (index > 0)
    run = jnp.cumsum(~moves_back, axis=1, dtype=jnp.int32)
    return jnp.argsort(run * parts - index, axis=1).astype(jnp.int32)


def pack_order(
    keep: Bool[Array, "B E"], head: Int[Array, "B E"], offset: Int[Array, "B heads_and_1"], window: int
) -> tuple[Order, Int[Array, "B heads_and_1"]]:
    """How `pack_rows` moves entries, and the new offsets.

    Entries are the S pool slots, ordered by head and position, then `window` tokens for each head, newer than any in
    the pool. Survivors are ordered by head and position again.
    """
    slots = keep.shape[1] - (offset.shape[1] - 1) * window
    to_pool, to_window, new_offset = targets(keep, offset, window)
    target = jnp.where(keep, jnp.concatenate([to_pool, to_window], axis=1), slots)
    source = jnp.arange(keep.shape[1], dtype=jnp.int32)
    scatter = lambda t: jnp.full(slots, -1, jnp.int32).at[t].set(source, mode="drop", unique_indices=False)
    size = part_size(slots)
    begin = jnp.arange(0, slots, size, dtype=jnp.int32)
    first = jax.vmap(lambda to: jnp.searchsorted(to, begin))(to_pool).astype(jnp.int32)
    return Order(jax.vmap(scatter)(target), order_of_parts(first, size)), new_offset


def pack_rows(
    pool: Shaped[Array, "B S *H"], window: Shaped[Array, "B heads_window *H"], order: Order
) -> Shaped[Array, "B S *H"]:
    """The pool after packing: slot s takes the row `source[s]` of pool and window joined, zeros where it is -1.

    It is written over the pool itself, one part of every row at a time, so that no more than these are held beside it.
    """
    slots, size, dtype = pool.shape[1], part_size(pool.shape[1]), pool.dtype
    # As integers: what rounds nothing may still turn one nan into another.
    bits = lambda a: jax.lax.bitcast_convert_type(a, f"uint{8 * dtype.itemsize}")
    # A CPU widens a whole bfloat16 array to write a part of it, but no array of integers.
    widened = dtype.itemsize < 4 and jax.default_backend() == "cpu"
    pool, window = (bits(pool), bits(window)) if widened else (pool, window)

    def part_of_row(pool: Array, window: Array, source: Array, part: Array) -> tuple[Array, Array]:
        start = jnp.minimum(part * size, slots - size)
        slot = start + jnp.arange(size, dtype=jnp.int32)
        # The last part may reach into the one before it, of which it leaves everything as it is.
        source = jnp.where(slot < part * size, slot, jax.lax.dynamic_slice_in_dim(source, start, size))
        pick = lambda rows, at: bits(rows.at[at].get(mode="clip"))
        at = source.reshape(size, *(1,) * (pool.ndim - 1))
        rows = jnp.where(at < slots, pick(pool, source), pick(window, source - slots))
        rows = jnp.where(at >= 0, rows, jnp.zeros((), rows.dtype))
        return jax.lax.bitcast_convert_type(rows, pool.dtype), start

    def write_parts(i: Int[Array, ""], pool: Shaped[Array, "B S *H"]) -> Shaped[Array, "B S *H"]:
        rows, start = jax.vmap(part_of_row)(pool, window, order.source, order.parts[:, i])
        return jax.vmap(lambda a, b, at: jax.lax.dynamic_update_slice_in_dim(a, b, at, 0))(pool, rows, start)

    pool = jax.lax.fori_loop(0, order.parts.shape[1], write_parts, pool)
    return jax.lax.bitcast_convert_type(pool, dtype)

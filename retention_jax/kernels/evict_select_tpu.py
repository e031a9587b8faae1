"""`evict_xla.select_top` as a Pallas kernel for TPU: the same threshold search, with a sequence's keys on the chip.

The search reads every key up to 32 times. Here it does so in VMEM, and it ends as soon as exactly as many keys as
needed reach the threshold. Positions are fetched only where scores tie, and heads not at all: a token's entries are
ordered by head, so the lower head is the earlier entry.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from retention_jax.kernels.blocks import LANES, SELECT_ROWS, SUBLANES, VMEM_LIMIT, check_select_vmem
from retention_jax.kernels.evict_xla import order_key

_LOWEST = np.int32(np.iinfo(np.int32).min)  # key of what is not live


class Sizes(NamedTuple):
    """What the kernel knows while it is compiled."""

    capacity: int
    groups: int
    window: int  # tokens of each group's window
    windows: int  # the entry that the first of them begins at
    rows: int  # of 128 entries, looked at together


class Thresholds(NamedTuple):
    """An entry survives whose (key, pos, ~index) is not below this, first things first."""

    key: Any
    pos: Any
    index: Any


def _kernel(offset, key, pos, out, arrived, *, sizes: Sizes):
    """`out` holds the positions until a group's survivors are known."""
    row, size, out = pl.program_id(0), sizes.rows * LANES, out.at[0]
    fetch = pltpu.make_async_copy(pos.at[row], out, arrived)
    if sizes.groups > 1:
        fetch.start()
        fetch.wait()

    def one_group(group, _):
        if sizes.groups == 1:
            spans = [(0, key.shape[0] * LANES)]
        else:
            at, windows = row * (sizes.groups + 1) + group, sizes.windows + group * sizes.window
            spans = [(offset[at], offset[at + 1]), (windows, windows + sizes.window)]

        def over(step: Callable[[Any, pl.Slice, Array, Array | None], Any], start: Any) -> Any:
            """Folds `step(carry, slice, index, inside)` over the group's entries."""
            index = lax.broadcasted_iota(jnp.int32, (sizes.rows, LANES), 0) * LANES
            index += lax.broadcasted_iota(jnp.int32, (sizes.rows, LANES), 1)
            for begin, end in spans:

                def one(chunk, carry, begin=begin, end=end):
                    here = pl.Slice(pl.multiple_of(chunk * sizes.rows, sizes.rows), sizes.rows)
                    entry = index + chunk * size
                    # Without groups, what is padded is as good as not live.
                    inside = None if sizes.groups == 1 else (entry >= begin) & (entry < end)
                    return step(carry, here, entry, inside)

                start = lax.fori_loop(begin // size, pl.cdiv(end, size), one, start)
            return start

        def count(test: Callable[[pl.Slice, Array], Array]) -> Any:
            def add(total, here, entry, inside):
                chosen = test(here, entry) if inside is None else test(here, entry) & inside
                return total + chosen.astype(jnp.int32).reshape(-1, SUBLANES, LANES).sum(axis=0)

            return jnp.sum(over(add, jnp.zeros((SUBLANES, LANES), jnp.int32)))

        def search(reaches: Callable[[Any], Callable], need: Any, reached: Any) -> tuple[Any, Any]:
            """A threshold that `need` of the entries reach, or the highest that more reach; and how many do."""

            def raise_threshold(state):
                bit, threshold, reached = state
                higher = threshold ^ (jnp.int32(1) << bit)  # as unsigned numbers, whose highest bit is turned around
                at_least = count(reaches(higher))
                enough = at_least >= need
                return bit - 1, jnp.where(enough, higher, threshold), jnp.where(enough, at_least, reached)

            goes_on = lambda state: (state[0] >= 0) & (state[2] > need)
            _, threshold, reached = lax.while_loop(goes_on, raise_threshold, (jnp.int32(31), _LOWEST, reached))
            return threshold, reached

        def by_key():
            live = count(lambda here, _: key[here] > _LOWEST)
            return search(lambda t: lambda here, _: key[here] >= t, jnp.int32(sizes.capacity), live)

        def by_position(above):
            if sizes.groups == 1:
                fetch.start()
                fetch.wait()
            need, tied = sizes.capacity - above, reached - above
            of_tied = lambda t: lambda here, _: (key[here] == lowest_key) & (out[here] >= t)
            threshold, at_least = search(of_tied, need, tied)
            newer = count(lambda here, _: (key[here] == lowest_key) & (out[here] > threshold))
            of_same = lambda t: lambda here, entry: (key[here] == lowest_key) & (out[here] == threshold) & (~entry >= t)
            return threshold, search(of_same, need - newer, at_least - newer)[0]

        lowest_key, reached = by_key()
        above = count(lambda here, _: key[here] > lowest_key)
        t = Thresholds(
            lowest_key,
            *lax.cond(reached > sizes.capacity, by_position, lambda _: (_LOWEST, _LOWEST), above),
        )

        def write(_, here, entry, inside):
            newer = (out[here] > t.pos) | ((out[here] == t.pos) & (~entry >= t.index))
            chosen = ((key[here] > t.key) | ((key[here] == t.key) & newer)).astype(jnp.int32)
            out[here] = chosen if inside is None else jnp.where(inside, chosen, out[here])
            return 0

        over(write, 0)
        return 0

    lax.fori_loop(0, sizes.groups, one_group, 0)


def select_top(
    score: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    live: Bool[Array, "B E"],
    *,
    capacity: int,
    groups: int,
    shared: int,
) -> Bool[Array, "B E"]:
    """The `capacity` best live entries of each row (groups=1) or of each head of each row (groups=heads).

    Entries are pool slots, ordered by head, then `shared` entries in windows, as many for each head. Ties: higher pos
    first, then lower head.

    Raises:
      ValueError: if a sequence's keys do not fit VMEM.
    """
    B, E = score.shape
    slots = E - shared
    check_select_vmem(E)
    rows = SELECT_ROWS if groups == 1 else SUBLANES  # a head has few
    # Signed, so that they compare as registers do.
    key = lax.bitcast_convert_type(order_key(score) ^ jnp.uint32(1 << 31), jnp.int32)
    key = jnp.where(live, jnp.maximum(key, _LOWEST + 1), _LOWEST)
    by_row = lambda a, rest: jnp.pad(a, ((0, 0), (0, -E % (rows * LANES))), constant_values=rest).reshape(B, -1, LANES)
    key, pos = by_row(key, _LOWEST), by_row(pos, -1)
    offset = jnp.zeros((B, 1), jnp.int32)
    if groups > 1:
        first = jax.vmap(lambda h: jnp.searchsorted(h, jnp.arange(groups, dtype=jnp.int32)))(head[:, :slots])
        offset = jnp.pad(first.astype(jnp.int32), ((0, 0), (0, 1)), constant_values=slots)
    passes = 34 if groups == 1 else 68
    out = pl.pallas_call(
        partial(_kernel, sizes=Sizes(capacity, groups, shared // groups, slots, rows)),
        jax.ShapeDtypeStruct(key.shape, jnp.int32, manual_axis_type=jax.typeof(key).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B,),
            in_specs=[
                pl.BlockSpec((None, *key.shape[1:]), lambda row, *_: (row, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            # With the axis of length 1, since copies to a part without it do not compile.
            out_specs=pl.BlockSpec((1, *key.shape[1:]), lambda row, *_: (row, 0, 0)),
            scratch_shapes=[pltpu.SemaphoreType.DMA(())],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=2 * passes * key.size, transcendentals=0, bytes_accessed=3 * 4 * key.size),
        name="evict_select",
    )(offset.reshape(-1), key, pos)
    return live & (out.reshape(B, -1)[:, :E] == 1)

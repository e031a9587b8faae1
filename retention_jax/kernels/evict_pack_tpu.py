"""`evict_xla.pack_order` and `pack_rows` for TPU: rows are never gathered one by one.

Survivors keep their order, so 128 slots of the next pool come from a few tiles of 128 neighbours in the pool and in the
windows. Each tile enters a matrix product with a one-hot matrix, which moves its survivors to their slots:

    out[d] = sum_c [target_c = d] source[c]

The matrix unit multiplies numbers, and would lose a nan, an infinity's neighbours (0 * inf is nan) and the sign of -0.
So a row goes through it byte by byte: an integer below 256 is exact in bfloat16, and so is a sum of it and zeros.
Pool and windows are read once, from front to back, the next block while the one before it is in use.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int, Shaped

from retention_jax.kernels.blocks import LANES, VMEM_LIMIT, pack_rows_at_once
from retention_jax.kernels.evict_xla import targets
from retention_jax.kernels.products_tpu import dot
from retention_jax.kernels.stream_tpu import Copy, Stream


class Route(NamedTuple):
    """Where the rows of the pool, or of the windows, go: in tiles of 128, padded to whole blocks."""

    target: Int[Array, "B blocks tiles 128"]  # -1: nowhere
    ends: Int[Array, "B 1 out_tiles"]  # how many tiles begin before the end of each tile of slots


class Order(NamedTuple):
    pool: Route
    window: Route


class Scratch(NamedTuple):
    """On-chip memory that outlives a program; of pool and windows two blocks each."""

    rows: tuple[Any, ...]
    targets: tuple[Any, ...]
    arrived: Any  # semaphores: pool or windows, place, rows or targets
    states: tuple[Any, ...]
    bytes: Any  # of a tile of slots, so far


def _route(target: Int[Array, "B rows"], first: Int[Array, "B rows"], used: Int[Array, " B"], slots: int) -> Route:
    """`first`: where a row would go if it survived; `used`: rows that count."""
    B, n = target.shape
    block = pack_rows_at_once(n)
    tiles = lambda a, rest: jnp.pad(a, ((0, 0), (0, -n % LANES)), constant_values=rest).reshape(B, -1, LANES)
    begins = tiles(first, slots)[:, :, 0]
    begins = jnp.where(jnp.arange(begins.shape[1], dtype=jnp.int32)[None] * LANES < used[:, None], begins, slots)
    limits = (jnp.arange(-(-slots // LANES), dtype=jnp.int32) + 1) * LANES
    ends = jax.vmap(lambda b: jnp.searchsorted(b, limits, method="compare_all"))(begins)
    return Route(tiles(target, -1).reshape(B, -1, block // LANES, LANES), ends.astype(jnp.int32)[:, None])


def pack_order(
    keep: Bool[Array, "B E"], head: Int[Array, "B E"], offset: Int[Array, "B heads_and_1"], window: int
) -> tuple[Order, Int[Array, "B heads_and_1"]]:
    """What `pack_rows` needs to know, and the new offsets. Entries are ordered as `evict_xla.pack_order` says."""
    B, heads = offset.shape[0], offset.shape[1] - 1
    slots = keep.shape[1] - heads * window
    to_pool, to_window, new_offset = targets(keep, offset, window)
    goes = lambda first, chosen: jnp.where(chosen, first, -1)
    whole = jnp.full(B, heads * window, jnp.int32)
    return (
        Order(
            _route(goes(to_pool, keep[:, :slots]), to_pool, offset[:, -1], slots),
            _route(goes(to_window, keep[:, slots:]), to_window, whole, slots),
        ),
        new_offset,
    )


def _kernel(pool_ends, window_ends, sources, routes, out, *scratch, rows_per_core: int, of_scalars: bool):
    """A program makes a block of slots, from a block of the pool and one of the windows at a time."""
    s = Scratch(*scratch)
    row = pl.program_id(0) * rows_per_core + pl.program_id(1)
    block = pl.program_id(2)
    tiles = out.shape[0] if of_scalars else out.shape[0] // LANES

    def stream(i: int, ends: Any) -> Stream:
        """Of the pool (0) or the windows (1)."""
        n = s.targets[i].shape[1]  # tiles of a block

        def copies(row, block, place):
            rows = pl.Slice(pl.multiple_of(block * n * LANES, n * LANES), n * LANES)
            arrays = (
                (sources[i].at[(row, block) if of_scalars else (row, rows)], s.rows[i]),
                (
                    routes[i].at[row, block],
                    s.targets[i],
                ),
            )
            return [
                Copy(True, pltpu.make_async_copy(source, target.at[place], s.arrived.at[i, place, a]))
                for a, (source, target) in enumerate(arrays)
            ]

        begin = pl.program_id(0) * rows_per_core
        last = lambda _: jnp.maximum(ends[0, ends.shape[1] - 1] - 1, 0) // n
        return Stream(s.states[i], begin, begin + rows_per_core, first=lambda _: 0, last=last, copies=copies)

    streams = [(stream(0, pool_ends), pool_ends), (stream(1, window_ends), window_ends)]

    @pl.when(block == 0)
    def _():
        for source, _ in streams:
            source.begin_row(row)

    def one_tile(tile, _):
        slot = block * tiles + tile
        s.bytes[...] = jnp.zeros_like(s.bytes)
        for i, (source, ends) in enumerate(streams):
            n = s.targets[i].shape[1]

            def add(tile_of_source, _, i=i, source=source, n=n):
                place, here = source.enter(row, tile_of_source // n), tile_of_source % n
                target = s.targets[i][place, pl.ds(here, 1)] - slot * LANES
                moves = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == target
                one_hot = moves.astype(jnp.float32).astype(jnp.bfloat16)
                if of_scalars:
                    s.bytes[...] += dot(_bytes_of_scalars(s.rows[i][place, pl.ds(here, 1)]), one_hot, 1, 1)
                else:
                    rows = s.rows[i][place, pl.ds(pl.multiple_of(here * LANES, LANES), LANES)]
                    for b, values in enumerate(_bytes(rows)):
                        s.bytes[b] += dot(one_hot, values, 1, 0)
                return 0

            # The tile before the first that begins here may end here.
            begins = jnp.maximum(ends[0, jnp.maximum(slot - 1, 0)] - 1, 0)
            lax.fori_loop(jnp.where(slot == 0, 0, begins), ends[0, slot], add, 0)
        if of_scalars:
            of_byte = [s.bytes[b : b + 1] for b in range(4)]
            out[pl.ds(tile, 1)] = _from_bytes(of_byte, out.dtype)
        else:
            of_byte = [s.bytes[b] for b in range(s.bytes.shape[0])]
            out[pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)] = _from_bytes(of_byte, out.dtype)
        return 0

    lax.fori_loop(0, tiles, one_tile, 0)


def _bytes(rows: Array) -> list[Array]:
    """The bytes of each integer, the lowest first, as numbers themselves."""
    bits = rows.astype(jnp.int32)
    return [((bits >> 8 * b) & 255).astype(jnp.float32).astype(jnp.bfloat16) for b in range(rows.dtype.itemsize)]


def _bytes_of_scalars(row: Array) -> Array:
    """[1, 128] numbers of four bytes to [16, 128]: a byte in each of the first rows."""
    bits = jnp.broadcast_to(row, (16, LANES))
    shift = 8 * jnp.minimum(lax.broadcasted_iota(jnp.int32, (16, LANES), 0), 3)
    return ((bits >> shift) & 255).astype(jnp.float32).astype(jnp.bfloat16)


def _from_bytes(values: list[Array], dtype: Any) -> Array:
    bits = sum((v.astype(jnp.int32) << 8 * b for b, v in enumerate(values)), jnp.zeros(values[0].shape, jnp.int32))
    return bits.astype(dtype)


def pack_rows(
    pool: Shaped[Array, "B S *H"], window: Shaped[Array, "B heads_window *H"], order: Order
) -> Shaped[Array, "B S *H"]:
    """The pool after packing, zeros where nothing lies: rows of H numbers, or numbers of four bytes.

    A pool whose slots are no multiple of 128 is copied first.
    """
    (B, S), of_scalars, dtype = pool.shape[:2], pool.ndim == 2, pool.dtype
    # Integers from here on: what rounds nothing may still turn one nan into another.
    pool, window = (lax.bitcast_convert_type(a, jnp.dtype(f"int{8 * dtype.itemsize}")) for a in (pool, window))

    def blocked(a: Array, route: Route) -> Array:
        blocks, tiles = route.target.shape[1:3]
        a = jnp.pad(a, [(0, 0), (0, blocks * tiles * LANES - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])
        return a.reshape(B, blocks, tiles, LANES) if of_scalars else a

    sources = blocked(pool, order.pool), blocked(window, order.window)
    routes = order.pool.target, order.window.target
    blocks = routes[0].shape[1]
    rows_per_core = B // (cores := 2 - B % 2)
    sequence = lambda core, i: core * rows_per_core + i
    block_of = lambda r: r.shape[2:] if of_scalars else (r.shape[2] * LANES, *pool.shape[2:])
    block = block_of(routes[0])
    zeros = (0,) * len(block)
    in_smem = lambda a: pl.BlockSpec(
        (None, *a.shape[1:]), lambda core, i, _: (sequence(core, i), 0, 0), memory_space=pltpu.SMEM
    )
    in_hbm = (pl.BlockSpec(memory_space=pl.ANY),) * 2
    size, width = pool.dtype.itemsize, 1 if of_scalars else pool.shape[2]
    out = pl.pallas_call(
        partial(_kernel, rows_per_core=rows_per_core, of_scalars=of_scalars),
        jax.ShapeDtypeStruct(sources[0].shape, pool.dtype, manual_axis_type=jax.typeof(pool).manual_axis_type),
        grid=(cores, rows_per_core, blocks),
        in_specs=[in_smem(order.pool.ends), in_smem(order.window.ends), in_hbm, in_hbm],
        out_specs=pl.BlockSpec(
            (None, None, *block) if of_scalars else (None, *block),
            lambda core, i, j: (sequence(core, i), j, *zeros[of_scalars - 1 :]),
        ),
        scratch_shapes=Scratch(
            rows=tuple(pltpu.VMEM((2, *block_of(r)), pool.dtype) for r in routes),
            targets=tuple(pltpu.VMEM((2, *r.shape[2:]), jnp.int32) for r in routes),
            arrived=pltpu.SemaphoreType.DMA((2, 2, 2)),
            states=(pltpu.SMEM((2,), jnp.int32),) * 2,
            bytes=pltpu.VMEM((16, LANES) if of_scalars else (size, LANES, *pool.shape[2:]), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            # A tile of slots takes from about two tiles of the pool.
            flops=2 * 2 * LANES * size * width * B * S,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*sources, *routes, sources[0])),
        ),
        name="evict_pack",
    )(order.pool.ends, order.window.ends, sources, routes)
    return lax.bitcast_convert_type(out.reshape(B, -1, *pool.shape[2:])[:, :S], dtype)

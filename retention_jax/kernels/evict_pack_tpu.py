"""`evict_xla.pack_order` and `pack_rows` for TPU: rows are never gathered one by one.

Survivors keep their order, so 128 slots of the next pool come from a few tiles of 128 neighbours in the pool and in the
windows. Each tile enters a matrix product with a one-hot matrix, which moves its survivors to their slots:

    out[d] = sum_c [target_c = d] source[c]

The matrix unit multiplies numbers, and would lose a nan, an infinity's neighbours (0 * inf is nan) and the sign of -0.
So a row goes through it byte by byte: an integer below 256 is exact in bfloat16, and so is a sum of it and zeros.
Pool and windows are read about once, the next block while the one before it is in use. The result is written over the
pool: each block of slots when nobody needs any more what it holds, in the order that `evict_xla.order_of_parts` tells.
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
from retention_jax.kernels.evict_xla import order_of_parts, targets
from retention_jax.kernels.products_tpu import dot
from retention_jax.kernels.stream_tpu import Copy, Stream


class Route(NamedTuple):
    """Where the rows of the pool, or of the windows, go: in tiles of 128, padded to whole blocks."""

    target: Int[Array, "B blocks tiles 128"]  # -1: nowhere
    starts: Int[Array, "B 1 out_tiles_and_1"]  # the first row that goes to each tile of slots or behind it
    first: Int[Array, "B parts"]  # the blocks that each part of the next pool comes from, in the order of `Order`
    last: Int[Array, "B parts"]


class Order(NamedTuple):
    parts: Int[Array, "B parts"]  # blocks of slots in the order in which they are written
    back: Int[Array, "B parts"]  # 1: one of neighbours that are written from their end, and so are all its rows
    pool: Route
    window: Route


class Scratch(NamedTuple):
    """On-chip memory that outlives a program; of pool and windows two blocks each."""

    rows: tuple[Any, ...]
    targets: tuple[Any, ...]
    arrived: Any  # semaphores: pool or windows, place, rows or targets
    states: tuple[Any, ...]
    bytes: Any  # of a tile of slots, so far
    result: Any  # two blocks of slots
    written: Any  # semaphores: place


def _starts(first: Int[Array, "B rows"], used: Int[Array, " B"], slots: int) -> Int[Array, "B out_tiles_and_1"]:
    """`Route.starts`. `first`: where a row would go if it survived; `used`: rows that count."""
    tiles = jnp.pad(first, ((0, 0), (0, -first.shape[1] % LANES)), constant_values=slots)
    tiles = tiles.reshape(first.shape[0], -1, LANES)
    index = jnp.arange(tiles.shape[1], dtype=jnp.int32)[None] * LANES
    begins = jnp.where(index < used[:, None], tiles[:, :, 0], slots)
    limits = jnp.arange(-(-slots // LANES) + 1, dtype=jnp.int32) * LANES
    # The last tile that begins before the limit, then the rows in it.
    before = jax.vmap(lambda b: jnp.searchsorted(b, limits, method="compare_all"))(begins).astype(jnp.int32)
    tile = jnp.maximum(before - 1, 0)
    rows = jnp.take_along_axis(tiles, tile[:, :, None], axis=1)
    inside = (rows < limits[None, :, None]).sum(axis=2, dtype=jnp.int32)
    return jnp.minimum(tile * LANES + inside, used[:, None])


def pack_order(
    keep: Bool[Array, "B E"], head: Int[Array, "B E"], offset: Int[Array, "B heads_and_1"], window: int
) -> tuple[Order, Int[Array, "B heads_and_1"]]:
    """What `pack_rows` needs to know, and the new offsets. Entries are ordered as `evict_xla.pack_order` says."""
    B, heads = offset.shape[0], offset.shape[1] - 1
    slots = keep.shape[1] - heads * window
    to_pool, to_window, new_offset = targets(keep, offset, window)
    size = pack_rows_at_once(slots)
    in_pool = _starts(to_pool, offset[:, -1], slots)
    in_window = _starts(to_window, jnp.full(B, heads * window, jnp.int32), slots)
    of_part = slice(0, None, size // LANES)
    parts = order_of_parts(in_pool[:, of_part][:, :-1], size)
    neighbours = parts[:, 1:] == parts[:, :-1] - 1
    back = jnp.pad(neighbours, ((0, 0), (0, 1))) | jnp.pad(neighbours, ((0, 0), (1, 0)))

    def route(first: Int[Array, "B rows"], chosen: Bool[Array, "B rows"], starts: Array, *, is_pool: bool) -> Route:
        rows = pack_rows_at_once(n := first.shape[1])
        blocks = -(-n // rows)
        target = jnp.pad(jnp.where(chosen, first, -1), ((0, 0), (0, blocks * rows - n)), constant_values=-1)
        begin, end = starts[:, of_part][:, :-1], starts[:, of_part][:, 1:]
        low, high = (jnp.minimum(a // rows, blocks - 1) for a in (begin, jnp.maximum(end - 1, begin)))
        if is_pool:  # a part of which nothing comes from the pool may be read over: no one writes it yet
            itself = jnp.arange(parts.shape[1], dtype=jnp.int32)[None]
            low, high = (jnp.where(begin < end, a, itself) for a in (low, high))
        low, high = (jnp.take_along_axis(a, parts, axis=1) for a in (low, high))
        ends = jnp.where(back, high, low), jnp.where(back, low, high)
        return Route(target.reshape(B, blocks, rows // LANES, LANES), starts[:, None], *ends)

    return (
        Order(
            parts,
            back.astype(jnp.int32),
            route(to_pool, keep[:, :slots], in_pool, is_pool=True),
            route(to_window, keep[:, slots:], in_window, is_pool=False),
        ),
        new_offset,
    )


class _Runs(NamedTuple):
    """What every program must know of its own part, and of the next one's."""

    parts: Any
    back: Any
    pool_first: Any
    pool_last: Any
    window_first: Any
    window_last: Any


def _kernel(*refs, rows_per_core: int, of_scalars: bool):
    """A program makes a block of slots, from a block of the pool and one of the windows at a time.

    The pool is read and written through one reference. What a program writes nobody after it reads, and what is on its
    way to the next program neither this one nor any before it writes: so `order_of_parts` has it.
    """
    runs = _Runs(*refs[: len(_Runs._fields)])
    pool_starts, window_starts, _, window, pool_route, window_route, pool, *scratch = refs[len(runs) :]
    sources, routes, s = (pool, window), (pool_route, window_route), Scratch(*scratch)
    parts = pl.num_programs(2)
    begin = pl.program_id(0) * rows_per_core * parts
    run = begin + pl.program_id(1) * parts + pl.program_id(2)
    back, place = runs.back[run] == 1, (run - begin) % 2
    tiles = s.targets[0].shape[1]
    part_of = lambda run, block, n: (
        (run // parts, block)
        if of_scalars
        else (run // parts, pl.Slice(pl.multiple_of(block * n * LANES, n * LANES), n * LANES))
    )
    write = lambda run, place: pltpu.make_async_copy(
        s.result.at[place], pool.at[part_of(run, runs.parts[run], tiles)], s.written.at[place]
    )
    turned = lambda i, n: jnp.where(back, n - 1 - i, i)

    def stream(i: int, first: Any, last: Any) -> Stream:
        """Of the pool (0) or the windows (1)."""
        n = s.targets[i].shape[1]  # tiles of a block

        def copies(run, block, place):
            arrays = (
                (sources[i].at[part_of(run, block, n)], s.rows[i]),
                (routes[i].at[run // parts, block], s.targets[i]),
            )
            return [
                Copy(True, pltpu.make_async_copy(source, target.at[place], s.arrived.at[i, place, a]))
                for a, (source, target) in enumerate(arrays)
            ]

        def stays(run):
            following = jnp.minimum(run + 1, begin + rows_per_core * parts - 1)
            return (following % parts != 0) & (first[following] == last[run]) & (following != run)

        return Stream(
            s.states[i],
            begin,
            begin + rows_per_core * parts,
            first=lambda run: first[run],
            last=lambda run: last[run],
            copies=copies,
            after=lambda run, block: block + 1 - 2 * runs.back[run],
            stays=stays,
        )

    streams = (
        (stream(0, runs.pool_first, runs.pool_last), pool_starts),
        (stream(1, runs.window_first, runs.window_last), window_starts),
    )
    for source, _ in streams:
        source.begin_row(run)
    pl.when(run - begin >= 2)(write(jnp.maximum(run - 2, begin), place).wait)

    def one_tile(turn, _):
        tile = turned(turn, tiles)
        slot = runs.parts[run] * tiles + tile
        s.bytes[...] = jnp.zeros_like(s.bytes)
        for i, (source, starts) in enumerate(streams):
            n = s.targets[i].shape[1]
            first, end = starts[0, slot], starts[0, slot + 1]
            count = jnp.where(first < end, (end - 1) // LANES - first // LANES + 1, 0)

            def add(turn, _, i=i, source=source, n=n, first=first, count=count):
                tile_of_source = first // LANES + turned(turn, count)
                place, here = source.enter(run, tile_of_source // n), tile_of_source % n
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

            lax.fori_loop(0, count, add, 0)
        if of_scalars:
            of_byte = [s.bytes[b : b + 1] for b in range(4)]
            s.result[place, pl.ds(tile, 1)] = _from_bytes(of_byte, s.result.dtype)
        else:
            of_byte = [s.bytes[b] for b in range(s.bytes.shape[0])]
            here = pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)
            s.result[place, here] = _from_bytes(of_byte, s.result.dtype)
        return 0

    lax.fori_loop(0, tiles, one_tile, 0)
    write(run, place).start()

    @pl.when(run == begin + rows_per_core * parts - 1)
    def _():
        pl.when(run > begin)(write(jnp.maximum(run - 1, begin), 1 - place).wait)
        write(run, place).wait()


def _integers(rows: Array) -> Array:
    """The same bits. It is done here since the compiler would copy a whole pool to call its numbers integers."""
    return pltpu.bitcast(rows, jnp.dtype(f"int{8 * rows.dtype.itemsize}"))


def _bytes(rows: Array) -> list[Array]:
    """The bytes of each number, the lowest first, as numbers themselves."""
    bits = _integers(rows).astype(jnp.int32)
    return [((bits >> 8 * b) & 255).astype(jnp.float32).astype(jnp.bfloat16) for b in range(rows.dtype.itemsize)]


def _bytes_of_scalars(row: Array) -> Array:
    """[1, 128] numbers of four bytes to [16, 128]: a byte in each of the first rows."""
    bits = jnp.broadcast_to(_integers(row), (16, LANES))
    shift = 8 * jnp.minimum(lax.broadcasted_iota(jnp.int32, (16, LANES), 0), 3)
    return ((bits >> shift) & 255).astype(jnp.float32).astype(jnp.bfloat16)


def _from_bytes(values: list[Array], dtype: Any) -> Array:
    bits = sum((v.astype(jnp.int32) << 8 * b for b, v in enumerate(values)), jnp.zeros(values[0].shape, jnp.int32))
    return pltpu.bitcast(bits.astype(jnp.dtype(f"int{8 * dtype.itemsize}")), dtype)


def pack_rows(
    pool: Shaped[Array, "B S *H"], window: Shaped[Array, "B heads_window *H"], order: Order
) -> Shaped[Array, "B S *H"]:
    """The pool after packing, zeros where nothing lies: rows of H numbers, or numbers of four bytes.

    It is written over the pool itself. A pool whose slots are no multiple of 128 is copied first.
    """
    (B, S), of_scalars, dtype = pool.shape[:2], pool.ndim == 2, pool.dtype
    bits = lambda a, dtype: lax.bitcast_convert_type(a, jnp.dtype(dtype))
    integer = f"int{8 * dtype.itemsize}"  # for what is copied: what rounds nothing may still turn one nan into another

    def blocked(a: Array, route: Route) -> Array:
        blocks, tiles = route.target.shape[1:3]
        if more := blocks * tiles * LANES - a.shape[1]:
            a = bits(jnp.pad(bits(a, integer), [(0, 0), (0, more), *[(0, 0)] * (a.ndim - 2)]), dtype)
        return a.reshape(B, blocks, tiles, LANES) if of_scalars else a

    sources = blocked(pool, order.pool), blocked(window, order.window)
    routes = order.pool.target, order.window.target
    blocks = routes[0].shape[1]
    rows_per_core = B // (cores := 2 - B % 2)
    sequence = lambda core, i: core * rows_per_core + i
    block_of = lambda r: r.shape[2:] if of_scalars else (r.shape[2] * LANES, *pool.shape[2:])
    runs = _Runs(order.parts, order.back, order.pool.first, order.pool.last, order.window.first, order.window.last)
    in_smem = lambda a: pl.BlockSpec(
        (None, *a.shape[1:]), lambda core, i, *_: (sequence(core, i), 0, 0), memory_space=pltpu.SMEM
    )
    size, width = pool.dtype.itemsize, 1 if of_scalars else pool.shape[2]
    starts = order.pool.starts, order.window.starts
    out = pl.pallas_call(
        partial(_kernel, rows_per_core=rows_per_core, of_scalars=of_scalars),
        jax.ShapeDtypeStruct(sources[0].shape, pool.dtype, manual_axis_type=jax.typeof(pool).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            grid=(cores, rows_per_core, blocks),
            in_specs=[*map(in_smem, starts), *[pl.BlockSpec(memory_space=pl.ANY)] * 4],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=Scratch(
                rows=tuple(pltpu.VMEM((2, *block_of(r)), pool.dtype) for r in routes),
                targets=tuple(pltpu.VMEM((2, *r.shape[2:]), jnp.int32) for r in routes),
                arrived=pltpu.SemaphoreType.DMA((2, 2, 2)),
                states=(pltpu.SMEM((2,), jnp.int32),) * 2,
                bytes=pltpu.VMEM((16, LANES) if of_scalars else (size, LANES, *pool.shape[2:]), jnp.float32),
                result=pltpu.VMEM((2, *block_of(routes[0])), pool.dtype),
                written=pltpu.SemaphoreType.DMA((2,)),
            ),
        ),
        input_output_aliases={len(runs) + len(starts): 0},
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
    )(*(a.reshape(-1) for a in runs), *starts, *sources, *routes)
    out = out.reshape(B, -1, *pool.shape[2:])
    return out if out.shape == pool.shape else bits(bits(out, integer)[:, :S], dtype)

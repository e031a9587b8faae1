"""Attention of new tokens over the buffer as a Pallas kernel for TPU: `buffer_attention_xla.py` says what it computes.

The segments of a layer's heads follow one another in the pool, so a program reads one contiguous piece of it, a block
after the other, and multiplies every block with the queries of the heads that own slots in it. What of the first and
the last block belongs to no head is not read, nor what of the recent window is not live. Blocks begin where registers
do, not where segments do: what a block holds of other heads is masked, its values too, since 0 * nan is nan. The recent
windows of all layers are an operand, since a layer cut out of them would be a copy.

A program does some tokens of one sequence, all heads. The next program's first block is on its way before it begins.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from retention_jax.kernels import slot_shards
from retention_jax.kernels.blocks import LANES, VMEM_LIMIT, BufferBlocks, buffer_blocks, registers
from retention_jax.kernels.buffer_attention_xla import Window
from retention_jax.kernels.partial_softmax import Partial
from retention_jax.kernels.products_tpu import dot, weighted
from retention_jax.kernels.stream_tpu import Copy, Stream


class Sizes(NamedTuple):
    """What the kernel knows while it is compiled."""

    heads: int
    tiles: int  # programs of a sequence
    programs: int  # of a core
    blocks: BufferBlocks
    scale: float


class Scratch(NamedTuple):
    """On-chip memory that outlives a program. Of what is streamed, two blocks."""

    pool: tuple[Any, ...]  # keys, values and, with a window, positions
    recent: tuple[Any, ...]  # keys and values
    pool_arrived: Any  # semaphores: place, array, piece
    recent_arrived: Any
    pool_state: Any
    recent_state: Any
    m: Any  # of one head's queries: running maximum, sum, output
    l: Any
    acc: Any
    column: Any


def _kernel(offset, recent_range, layer, oldest, recent_pos, q, pool, recent, out, lse, *scratch, sizes: Sizes):
    """With a window `pool` has positions, `oldest` is what a sequence's first new token still sees, and `recent_pos`
    the position of its recent window's first token."""
    s, blocks, K = Scratch(*scratch), sizes.blocks, sizes.heads
    begin = pl.program_id(0) * sizes.programs
    program = begin + pl.program_id(1)
    row_of = lambda program: program // sizes.tiles
    bound = lambda program, head: offset[row_of(program) * (K + 1) + head]
    slots = pool[0].shape[1]
    recent_begin = lambda program: recent_range[row_of(program) * 2]
    recent_end = lambda program: recent_range[row_of(program) * 2 + 1]
    # Each head's part of the recent window in as many blocks, at least one.
    first_recent = lambda program: recent_begin(program) // blocks.recent
    recent_blocks = lambda program: jnp.maximum(pl.cdiv(recent_end(program), blocks.recent) - first_recent(program), 1)
    start = lambda block: jnp.minimum(block * blocks.pool, slots - blocks.pool)

    def pool_copies(program, block, place):
        row, first = row_of(program), pl.multiple_of(start(block), LANES)
        pieces = []
        for i in range(blocks.pool // blocks.piece):
            here = pl.Slice(i * blocks.piece, blocks.piece)
            there = pl.Slice(first + i * blocks.piece, blocks.piece)
            needed = (there.start < bound(program, K)) & (there.start + blocks.piece > bound(program, 0))
            for a, (source, target) in enumerate(zip(pool, s.pool, strict=True)):
                # Positions lie along lanes.
                at = (lambda rows: (slice(None), rows)) if a == 2 else (lambda rows: (rows,))
                copy = pltpu.make_async_copy(
                    source.at[(row, *at(there))], target.at[(place, *at(here))], s.pool_arrived.at[place, a, i]
                )
                pieces.append(Copy(needed, copy))
        return pieces

    def recent_copies(program, block, place):
        row, n = row_of(program), recent_blocks(program)
        head = block // n
        first = pl.multiple_of((first_recent(program) + block % n) * blocks.recent, blocks.recent_piece)
        pieces = []
        for i in range(blocks.recent // blocks.recent_piece):
            here = pl.Slice(i * blocks.recent_piece, blocks.recent_piece)
            there = pl.Slice(first + i * blocks.recent_piece, blocks.recent_piece)
            needed = (there.start < recent_end(program)) & (there.start + blocks.recent_piece > recent_begin(program))
            for a, (source, target) in enumerate(zip(recent, s.recent, strict=True)):
                copy = pltpu.make_async_copy(
                    source.at[row, layer[0], head, there], target.at[place, here], s.recent_arrived.at[place, a, i]
                )
                pieces.append(Copy(needed, copy))
        return pieces

    stream = partial(Stream, begin=begin, end=begin + sizes.programs)
    first_block = lambda program: jnp.minimum(bound(program, 0), slots - 1) // blocks.pool
    pool_stream = stream(
        s.pool_state,
        first=first_block,
        last=lambda program: jnp.maximum(pl.cdiv(bound(program, K), blocks.pool) - 1, first_block(program)),
        copies=pool_copies,
    )
    recent_stream = stream(
        s.recent_state, first=lambda _: 0, last=lambda program: K * recent_blocks(program) - 1, copies=recent_copies
    )
    pool_stream.begin_row(program)
    recent_stream.begin_row(program)
    token = lax.broadcasted_iota(jnp.int32, (q.shape[1], 1), 0) % blocks.tokens
    oldest_seen = oldest[row_of(program)] + program % sizes.tiles * blocks.tokens + token

    def one_head(head, _):
        s.m[...] = jnp.full_like(s.m, float(jnp.finfo(jnp.float32).min))  # finite: where nothing is visible, m - m is 0
        s.l[...] = jnp.zeros_like(s.l)
        s.acc[...] = jnp.zeros_like(s.acc)

        def pool_block(block, _):
            place = pool_stream.enter(program, block)
            first = jnp.maximum(bound(program, head), block * blocks.pool)
            inside = lambda index: (index >= first - start(block)) & (index < bound(program, head + 1) - start(block))
            keys, values, *pos = (a[place] for a in s.pool)
            _add(s, q[head], keys, values, inside, pos[0] >= oldest_seen if pos else None, sizes.scale)
            return 0

        # Up to the block that the head's last slot is in.
        ends = pl.cdiv(bound(program, head + 1), blocks.pool)
        begins = bound(program, head) // blocks.pool
        lax.fori_loop(begins, jnp.where(bound(program, head) < bound(program, head + 1), ends, begins), pool_block, 0)

        def recent_block(block, _):
            place = recent_stream.enter(program, head * recent_blocks(program) + block)
            first = (first_recent(program) + block) * blocks.recent
            visible = None
            if len(pool) == 3:
                index = lax.broadcasted_iota(jnp.int32, (1, blocks.recent), 1)
                visible = recent_pos[row_of(program)] + first + index >= oldest_seen
            inside = lambda index: (index >= recent_begin(program) - first) & (index < recent_end(program) - first)
            _add(s, q[head], s.recent[0][place], s.recent[1][place], inside, visible, sizes.scale)
            return 0

        lax.fori_loop(0, recent_blocks(program), recent_block, 0)
        mass = s.l[...]
        out[head] = s.acc[...] / jnp.maximum(mass, 1e-30)
        total = jnp.where(mass > 0, s.m[...] + jnp.log(mass), -jnp.inf)
        s.column[: total.shape[0]] = jnp.broadcast_to(total, (total.shape[0], LANES))
        lse[head] = s.column[...].T[:1]
        return 0

    lax.fori_loop(0, K, one_head, 0)


def _add(
    s: Scratch, q: Array, keys: Array, values: Array, inside: Callable, visible: Array | None, scale: float
) -> None:
    """Adds a block to the running softmax: its rows that are `inside`, to the queries they are `visible` to."""
    n = keys.shape[0]
    mask = inside(lax.broadcasted_iota(jnp.int32, (1, n), 1))
    if visible is not None:
        mask = mask & visible
    logits = jnp.where(mask, dot(q, keys, 1, 1) * scale, -jnp.inf)
    values = jnp.where(inside(lax.broadcasted_iota(jnp.int32, (n, 1), 0)), values, jnp.zeros_like(values))
    m_old = s.m[...]
    m_new = jnp.maximum(m_old, logits.max(axis=1, keepdims=True))
    p, shrink = jnp.exp(logits - m_new), jnp.exp(m_old - m_new)
    s.m[...] = m_new
    s.l[...] = s.l[...] * shrink + p.sum(axis=1, keepdims=True)
    s.acc[...] = s.acc[...] * shrink + weighted(p, values)


@partial(jax.jit, static_argnames="blocks", inline=True)  # a constraint on an operand's place cannot run eagerly
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
    blocks: BufferBlocks | None = None,
) -> Partial:
    """Ordinary attention of T new tokens over everything their key/value head holds, the new tokens not included.

    Sums are float32, matrix products take the inputs' dtype. A pool whose slots are no multiple of 128 is copied first,
    and a layer's recent windows where their tokens are no multiple of 16, nor of 512 where there are more. `blocks` are
    chosen by size where not given. The compiler is told a cost as if the layers shared the pool evenly, and
    slot shards the recent windows.

    Raises:
      ValueError: if q, keys and values are not all float32 or all bfloat16, or if a sequence's heads do not fit VMEM.
    """
    (B, T, N, H), (L, K, R), S = q.shape, recent_k.shape[1:4], pool_k.shape[1]
    if len({x.dtype for x in (q, pool_k, pool_v, recent_k, recent_v)}) > 1 or q.dtype not in (
        jnp.float32,
        jnp.bfloat16,
    ):
        raise ValueError(
            "buffer_attention on TPU takes queries, keys and values all in float32 or all in bfloat16, got "
            f"{q.dtype}, {pool_k.dtype}, {pool_v.dtype}, {recent_k.dtype} and {recent_v.dtype}"
        )
    G = N // K
    if blocks is None:
        blocks = buffer_blocks(T, S, R, K, G, H, q.dtype)
    tiles = -(-T // blocks.tokens)
    Q = registers(G * blocks.tokens, q.dtype)
    pad = lambda a, axis, to: jnp.pad(a, [(0, -a.shape[i] % to if i == axis else 0) for i in range(a.ndim)])
    queries = pad(q, 1, blocks.tokens).reshape(B, tiles, blocks.tokens, K, G, H).transpose(0, 1, 3, 4, 2, 5)
    queries = pad(queries.reshape(B * tiles, K, G * blocks.tokens, H), 2, Q)
    pool = tuple(pad(a, 1, LANES) for a in (pool_k, pool_v))
    recent = recent_k, recent_v
    if R % blocks.recent:
        one = lambda a: lax.dynamic_index_in_dim(a, layer, axis=1)
        recent, layer = tuple(pad(one(a), 3, blocks.recent) for a in recent), jnp.int32(0)
    # Else the compiler, given room, copies the windows of all layers into VMEM for each layer.
    pool, recent = (tuple(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in of) for of in (pool, recent))
    nothing = jnp.zeros(B, jnp.int32)
    oldest, recent_pos = nothing, nothing
    if window is not None:
        oldest, recent_pos = window.seen - window.size + 1, window.recent_pos
        # Another layout in memory, which the compiler makes once a token, outside the loop over layers.
        pool = *pool, pad(window.pool_pos, 1, LANES)[:, None]
    sizes = Sizes(K, tiles, B * tiles // (cores := 2 - B * tiles % 2), blocks, H**-0.5)

    in_hbm = lambda arrays: tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in arrays)
    of_program = lambda *shape: pl.BlockSpec(
        (None, K, *shape), lambda core, i, *_: (core * sizes.programs + i, 0, 0, 0)
    )
    two = lambda rows, arrays: tuple(
        pltpu.VMEM((2, 1, rows) if a.ndim == 3 and a.shape[1] == 1 and i == 2 else (2, rows, H), a.dtype)
        for i, a in enumerate(arrays)
    )
    columns = registers(Q, q.dtype, LANES)
    varying = jax.typeof(queries).manual_axis_type
    result = lambda *shape: jax.ShapeDtypeStruct((B * tiles, K, *shape), jnp.float32, manual_axis_type=varying)
    # Each head's share of the pool, and this shard's of the recent windows, in which it reads `recent_range`.
    in_pool, in_window = 1 / (L * K), 1 / slot_shards.count()
    logits = int(B * tiles * blocks.tokens * N * (in_pool * S + in_window * R))
    size = lambda arrays: sum(a.size * a.dtype.itemsize for a in arrays)
    held = int(size(pool) + in_window * size((recent_k, recent_v))) // L
    out, lse = pl.pallas_call(
        partial(_kernel, sizes=sizes),
        (result(Q, H), result(1, columns)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, sizes.programs),
            in_specs=[of_program(Q, H), in_hbm(pool), in_hbm(recent)],
            out_specs=(of_program(Q, H), of_program(1, columns)),
            scratch_shapes=Scratch(
                pool=two(blocks.pool, pool),
                recent=two(blocks.recent, recent),
                pool_arrived=pltpu.SemaphoreType.DMA((2, len(pool), blocks.pool // blocks.piece)),
                recent_arrived=pltpu.SemaphoreType.DMA((2, 2, blocks.recent // blocks.recent_piece)),
                pool_state=pltpu.SMEM((2,), jnp.int32),
                recent_state=pltpu.SMEM((2,), jnp.int32),
                m=pltpu.VMEM((Q, 1), jnp.float32),
                l=pltpu.VMEM((Q, 1), jnp.float32),
                acc=pltpu.VMEM((Q, H), jnp.float32),
                column=pltpu.VMEM((columns, LANES), jnp.float32),
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * H * logits,
            transcendentals=logits,
            bytes_accessed=tiles * held + queries.size * (queries.dtype.itemsize + 4),
        ),
        name="buffer_attention",
    )(offset.reshape(-1), recent_range.reshape(-1), layer.reshape(1), oldest, recent_pos, queries, pool, recent)
    by_token = lambda a: (
        a[:, :, : G * blocks.tokens]
        .reshape(B, tiles, K, G, blocks.tokens, *a.shape[3:])
        .transpose(0, 1, 4, 2, 3, *range(5, 2 + a.ndim))
        .reshape(B, -1, N, *a.shape[3:])[:, :T]
    )
    return Partial(by_token(out), by_token(lse[:, :, 0]))

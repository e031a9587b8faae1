"""`reference.retention_mass` as Pallas kernels for TPU: O(T) memory, forward and backward, and few exponentials.

Tokens lie in rows of 128: token t is lane b of row a, t = 128 a + b. The weight at t of an entry i in an earlier row is
what is left of it at the start of t's row, times what the rest of the row leaves, both at most 1:

    e^((t - i) log_beta_i) = A[a, i] F[b, i]      A = e^((128 a - i) log_beta_i)      F = e^(b log_beta_i)

so what 128 entries add to C rows of tokens is a matrix product [C, 128] x [128, 128], and an exponential serves 128
pairs of token and entry:

    S[a, b] += sum_i A[a, i] F[b, i]
    dlog_beta_i += sum_a A[a, i] ((128 a - i) sum_b dS[a, b] F[b, i] + sum_b dS[a, b] b F[b, i])

Entries of the tokens' own row are weighed one by one. A row of entries is taken once for each document in it, and added
where the tokens' ids are that document's. Rows before which all of its entries have decayed to exactly 0 in float32 are
left out, which changes no bit. One program does one head of one sequence, whose T numbers stay in VMEM.
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

from retention_jax.kernels.block_pairs import reached
from retention_jax.kernels.blocks import LANES, SUBLANES, VMEM_LIMIT, MassBlocks, mass_blocks


class Scalars(NamedTuple):
    """Of one head: the last row that each row of entries reaches; of its sequence: ids in each chunk of C rows."""

    reach: Any
    low: Any
    high: Any


def _forward_kernel(reach, low, high, log_beta, segment, mass, *, C: int):
    mass[...] = jnp.zeros_like(mass)

    def own_row(row, gate, ids):
        weight, _ = _own_row(gate, ids)
        # The sums over entries as a row of tokens: ones times the transposed weights.
        mass[pl.ds(row, 1), :] += _dot(jnp.ones((SUBLANES, LANES), jnp.float32), weight, 1, 1)[:1]

    def later_rows(row, gate, ids, document, rows):
        decayed, _ = _at_row_starts(gate, ids == document, row, rows)
        added = _dot(decayed, jnp.exp(_lane_ages() * gate), 1, 1)
        mass[rows, :] += jnp.where(segment[rows, :] == document, added, 0.0)

    _over_entries(Scalars(reach, low, high), log_beta, segment, own_row, later_rows, C)


def _backward_kernel(reach, low, high, log_beta, segment, dmass, grad, *, C: int):
    def own_row(row, gate, ids):
        weight, age = _own_row(gate, ids)
        cotangent = jnp.broadcast_to(dmass[pl.ds(row, 1), :], (SUBLANES, LANES))
        grad[pl.ds(row, 1), :] = _dot(cotangent, weight * age, 1, 0)[:1]

    def later_rows(row, gate, ids, document, rows):
        decayed, age = _at_row_starts(gate, ids == document, row, rows)
        cotangent = jnp.where(segment[rows, :] == document, dmass[rows, :], 0.0)
        lane_age = _lane_ages()
        rest = jnp.exp(lane_age * gate)
        by_age = age * _dot(cotangent, rest, 1, 0) + _dot(cotangent, lane_age * rest, 1, 0)
        grad[pl.ds(row, 1), :] += jnp.sum(decayed * by_age, axis=0, keepdims=True)

    _over_entries(Scalars(reach, low, high), log_beta, segment, own_row, later_rows, C)


def _over_entries(
    scalars: Scalars, log_beta: Any, segment: Any, own_row: Callable, later_rows: Callable, C: int
) -> None:
    """Calls `own_row` for every row of entries, and `later_rows` for each of its documents and chunk of C rows that
    some of its entries reach."""

    def one_row(row, _):
        gate, ids = log_beta[pl.ds(row, 1), :], segment[pl.ds(row, 1), :]
        own_row(row, gate, ids)
        first, last = (row + 1) // C, scalars.reach[0, row] // C
        highest = jnp.max(ids)

        def one_document(document):
            def one_chunk(chunk, _):
                @pl.when((scalars.low[0, chunk] <= document) & (document <= scalars.high[0, chunk]))
                def _():
                    later_rows(row, gate, ids, document, pl.Slice(pl.multiple_of(chunk * C, C), C))

                return 0

            lax.fori_loop(first, last + 1, one_chunk, 0)
            return jnp.min(jnp.where(ids > document, ids, highest))

        def next_document(carry):
            document, _ = carry
            return one_document(document), document < highest

        lax.while_loop(lambda carry: carry[1], next_document, (jnp.min(ids), True))
        return 0

    lax.fori_loop(0, log_beta.shape[0], one_row, 0)


def _lane_ages() -> Array:
    """`b` along sublanes, for any entry."""
    return lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0).astype(jnp.float32)


def _own_row(gate: Array, ids: Array) -> tuple[Array, Array]:
    """Weights and ages of entries (lanes) at the tokens of their own row (sublanes)."""
    age = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) - lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    documents = jnp.broadcast_to(ids, (LANES, LANES))
    visible = (age >= 0) & (documents.T == documents)
    age = age.astype(jnp.float32)
    return jnp.exp(jnp.where(visible, age * gate, -jnp.inf)), age


def _at_row_starts(gate: Array, chosen: Array, row: Any, rows: pl.Slice) -> tuple[Array, Array]:
    """What is left of the chosen entries (lanes) where later rows (sublanes) begin, 0 in other rows; and their ages."""
    shape = (rows.size, LANES)
    distance = lax.broadcasted_iota(jnp.int32, shape, 0) + (rows.start - row)
    age = (distance * LANES - lax.broadcasted_iota(jnp.int32, shape, 1)).astype(jnp.float32)
    return jnp.exp(jnp.where((distance > 0) & chosen, age * gate, -jnp.inf)), age


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _by_head(
    kernel: Callable, name: str, products: int, blocks: MassBlocks, log_beta: Array, segment_ids: Array, *more: Array
) -> Array:
    """Runs a kernel for every head of every sequence."""
    (B, heads, T), C = log_beta.shape, blocks.rows
    pad = -T % (C * LANES)
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on its weight is exactly 0, as that of -inf.
    gates = jnp.maximum(log_beta.astype(jnp.float32), float(jnp.finfo(jnp.float32).min) / (2 * (T + pad)))
    # Padding comes last: no real token sees it, and it has no cotangent.
    by_row = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, pad))).reshape(B * heads, -1, LANES)
    gates, *cotangents = (by_row(x.astype(jnp.float32)) for x in (gates, *more))
    segment = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, pad)), mode="edge").reshape(B, -1, LANES)
    rows = segment.shape[1]
    by_chunk = segment.reshape(B, 1, rows // C, C * LANES)
    scalars = Scalars(
        reached(gates.max(axis=2), 0.0, jnp.int32(T + pad), LANES)[:, None], by_chunk.min(axis=3), by_chunk.max(axis=3)
    )
    of_head = pl.BlockSpec((None, rows, LANES), lambda row: (row, 0, 0))
    in_smem = lambda size, share: pl.BlockSpec(
        (None, 1, size), lambda row: (row // share, 0, 0), memory_space=pltpu.SMEM
    )
    pairs = B * heads * rows**2 // 2  # of a row of entries with a later row, an upper bound where some are skipped
    out = pl.pallas_call(
        partial(kernel, C=C),
        jax.ShapeDtypeStruct(gates.shape, jnp.float32, manual_axis_type=jax.typeof(gates).manual_axis_type),
        grid=(B * heads,),
        in_specs=[
            in_smem(rows, 1),
            in_smem(rows // C, heads),
            in_smem(rows // C, heads),
            of_head,
            pl.BlockSpec((None, rows, LANES), lambda row: (row // heads, 0, 0)),
            *(of_head for _ in cotangents),
        ],
        out_specs=of_head,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * LANES**2,
            transcendentals=pairs * LANES,
            bytes_accessed=4 * (2 + len(cotangents)) * gates.size + 4 * segment.size,
        ),
        name=name,
    )(*scalars, gates, segment, *cotangents)
    return out.reshape(B, heads, -1)[..., :T].astype(log_beta.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mass(log_beta: Array, segment_ids: Array, blocks: MassBlocks) -> Array:
    return _by_head(_forward_kernel, "retention_mass_forward", 1, blocks, log_beta, segment_ids)


def _mass_fwd(log_beta: Array, segment_ids: Array, blocks: MassBlocks) -> tuple[Array, tuple[Array, Array]]:
    return _mass(log_beta, segment_ids, blocks), (log_beta, segment_ids)


def _mass_bwd(blocks: MassBlocks, residuals: tuple[Array, Array], dmass: Array) -> tuple[Array, None]:
    return _by_head(_backward_kernel, "retention_mass_backward", 2, blocks, *residuals, dmass), None


_mass.defvjp(_mass_fwd, _mass_bwd)


def retention_mass(
    log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"], *, blocks: MassBlocks | None = None
) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `reference.retention_mass`.

    Memory grows with T, not T^2, forward and backward; time with what has not yet decayed. Sums are in float32; the
    result has log_beta's dtype. `blocks` are chosen by size where not given.

    Raises:
      ValueError: if log_beta is neither float32 nor bfloat16, or if a sequence does not fit on-chip memory.
    """
    if log_beta.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"retention_mass on TPU takes log_beta in float32 or bfloat16, got {log_beta.dtype}")
    return _mass(log_beta, segment_ids, mass_blocks(log_beta.shape[-1]) if blocks is None else blocks)

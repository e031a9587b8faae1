"""The three Pallas kernels of `retention_attention_tpu.py`: forward, dq, and dk, dv, dlog_beta.

The arithmetic is that of `retention_attention_xla.py`. A tile of logits lies transposed, keys along sublanes and
queries along lanes, so that a query's maximum, sum, log-sum-exp and delta are rows of T numbers: they cost no padding
in HBM, reductions over keys add whole registers, and what belongs to a query multiplies the transposed accumulator
[H, R] as it is. The bias (t - i) log_beta_i and the mask of a pair of blocks are made once, on the chip, and serve all
query heads of the key/value head.

One program visits one pair of blocks of one key/value head; which pairs there are, `block_pairs.py` decides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from retention_jax.kernels.block_pairs import Pair, Pairs, pair_at
from retention_jax.kernels.blocks import LANES, VMEM_LIMIT
from retention_jax.kernels.products_tpu import dot, weighted


class Inputs(NamedTuple):
    """Heads before tokens, T a multiple of the block, H of 128, log_beta finite."""

    q: Float[Array, "BK G T H"]
    k: Float[Array, "BK T H"]
    v: Float[Array, "BK T H"]
    log_beta: Float[Array, "BK 1 T"]
    segment_ids: Int[Array, "B 1 T"]


class Sizes(NamedTuple):
    """What the kernels know while they are compiled."""

    heads: int  # key/value heads of a sequence
    groups: int  # query heads of a key/value head
    blocks: int  # of a sequence
    block: int  # tokens
    stripe: int  # queries of a tile
    scale: float


class Visit(NamedTuple):
    """Where a program is."""

    sizes: Sizes
    pair: Pair
    window: Any
    first: Any  # of the block that the result belongs to
    last: Any
    counts: Any  # the pair is real and not decayed


def forward(x: Inputs, pairs: Pairs, sizes: Sizes, out_dtype: Any) -> tuple[Array, Array]:
    """Output [BK G T H] and log-sum-exp [BK G 1 T]; `pairs` are ordered by query block."""
    (BK, G, T, H), R = x.q.shape, sizes.block
    out, lse = _call(
        _forward_kernel,
        "retention_attention_forward",
        x,
        pairs,
        sizes,
        outputs=[
            _Output("query", 2, x.q.shape, out_dtype),
            _Output("query", 3, (BK, G, 1, T), jnp.float32),
        ],
        scratch=[(G, 1, R), (G, 1, R), (G, H, R), (R, R)],
        products=3,
    )
    return out, lse


def gradient_of_queries(
    x: Inputs,
    do: Float[Array, "BK G T H"],
    lse: Float[Array, "BK G 1 T"],
    delta: Float[Array, "BK G 1 T"],
    pairs: Pairs,
    sizes: Sizes,
) -> Float[Array, "BK G T H"]:
    """dq; `pairs` are ordered by query block."""
    (_, G, _, H), R = x.q.shape, sizes.block
    (dq,) = _call(
        _dq_kernel,
        "retention_attention_dq",
        x,
        pairs,
        sizes,
        do,
        lse,
        delta,
        outputs=[_Output("query", 2, x.q.shape, x.q.dtype)],
        scratch=[(G, H, R), (R, R)],
        products=4,
    )
    return dq


def gradients_of_keys(
    x: Inputs,
    do: Float[Array, "BK G T H"],
    lse: Float[Array, "BK G 1 T"],
    delta: Float[Array, "BK G 1 T"],
    pairs: Pairs,
    sizes: Sizes,
) -> tuple[Float[Array, "BK T H"], Float[Array, "BK T H"], Float[Array, "BK 1 T"]]:
    """dk, dv and dlog_beta; `pairs` are ordered by key block."""
    H, R = x.q.shape[-1], sizes.block
    dk, dv, dlog_beta = _call(
        _dkv_kernel,
        "retention_attention_dkv",
        x,
        pairs,
        sizes,
        do,
        lse,
        delta,
        outputs=[
            _Output("key", 1, x.k.shape, x.k.dtype),
            _Output("key", 1, x.v.shape, x.v.dtype),
            _Output("key", 2, x.log_beta.shape, jnp.float32),
        ],
        scratch=[(R, H), (R, H), (R, 1), (R, R)],
        products=6,
        by_key=True,
    )
    return dk, dv, dlog_beta


def _forward_kernel(at: Visit, q, k, v, log_beta, q_segment, k_segment, out, lse, m, l, acc, bias):
    @pl.when(at.first)
    def _():
        m[...] = jnp.full_like(m, -jnp.inf)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(at.counts)
    def _():
        _write_bias(bias, at, log_beta, q_segment, k_segment)
        keys, values_t = k[...], v[...].T

        def add(g, queries):
            row = g, slice(None), queries
            logits = dot(keys, q[g, queries], 1, 1) * at.sizes.scale + bias[:, queries]
            m_old = m[row]
            m_new = jnp.maximum(m_old, logits.max(axis=0, keepdims=True))
            p, shrink = jnp.exp(logits - m_new), jnp.exp(m_old - m_new)
            m[row] = m_new
            l[row] = l[row] * shrink + p.sum(axis=0, keepdims=True)
            acc[g, :, queries] = acc[g, :, queries] * shrink + weighted(values_t, p)

        _over_stripes(add, at.sizes)

    @pl.when(at.last)
    def _():
        def write(g, queries):
            row = g, slice(None), queries
            out[g, queries] = (acc[g, :, queries] / l[row]).T.astype(out.dtype)
            lse[row] = m[row] + jnp.log(l[row])

        _over_stripes(write, at.sizes)


def _dq_kernel(at: Visit, q, k, v, log_beta, q_segment, k_segment, do, lse, delta, dq, acc, bias):
    @pl.when(at.first)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(at.counts)
    def _():
        _write_bias(bias, at, log_beta, q_segment, k_segment)
        keys, values = k[...], v[...]
        keys_t = keys.T

        def add(g, queries):
            row = g, slice(None), queries
            _, ds = _weights(keys, values, q[g, queries], do[g, queries], lse[row], delta[row], bias[:, queries], at)
            acc[g, :, queries] += weighted(keys_t, ds)

        _over_stripes(add, at.sizes)

    @pl.when(at.last)
    def _():
        def write(g, queries):
            dq[g, queries] = (acc[g, :, queries] * at.sizes.scale).T.astype(dq.dtype)

        _over_stripes(write, at.sizes)


def _dkv_kernel(at: Visit, q, k, v, log_beta, q_segment, k_segment, do, lse, delta, dk, dv, dlog_beta, *scratch):
    dk_acc, dv_acc, gate_acc, bias = scratch

    @pl.when(at.first)
    def _():
        for acc in (dk_acc, dv_acc, gate_acc):
            acc[...] = jnp.zeros_like(acc)

    @pl.when(at.counts)
    def _():
        _write_bias(bias, at, log_beta, q_segment, k_segment)
        keys, values = k[...], v[...]

        def add(g, queries):
            row, q_g, do_g = (g, slice(None), queries), q[g, queries], do[g, queries]
            p, ds = _weights(keys, values, q_g, do_g, lse[row], delta[row], bias[:, queries], at)
            dv_acc[...] += weighted(p, do_g)
            dk_acc[...] += weighted(ds, q_g)
            gate_acc[...] += (ds * _age(at, queries)).sum(axis=1, keepdims=True)

        _over_stripes(add, at.sizes)

    @pl.when(at.last)
    def _():
        dk[...] = (dk_acc[...] * at.sizes.scale).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)
        dlog_beta[...] = jnp.broadcast_to(gate_acc[...], (at.sizes.block, LANES)).T[:1]


def _over_stripes(body: Callable[[Any, pl.Slice], None], sizes: Sizes) -> None:
    """Calls `body(g, queries)` for the stripes of a block's queries, of every query head."""
    stripes = sizes.block // sizes.stripe

    def step(i, _):
        body(i // stripes, pl.Slice(pl.multiple_of(i % stripes * sizes.stripe, sizes.stripe), sizes.stripe))
        return 0

    lax.fori_loop(0, sizes.groups * stripes, step, 0)


def _visit(codes: Any, reach: Any, window: Any, sizes: Sizes, *, by_key: bool) -> Visit:
    row, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    at = partial(pair_at, codes, row, heads=sizes.heads, blocks=sizes.blocks)
    owner = lambda pair: pair.key if by_key else pair.query
    pair = at(step)
    before, after = at(jnp.maximum(step - 1, 0)), at(jnp.minimum(step + 1, steps - 1))
    return Visit(
        sizes,
        pair,
        window[0],
        (step == 0) | (owner(before) != owner(pair)),
        (step == steps - 1) | (owner(after) != owner(pair)),
        pair.live & (pair.query <= reach[row * sizes.blocks + pair.key]),
    )


def _column(row: Array) -> Array:
    """[1, R] to [R, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _age(at: Visit, queries: pl.Slice) -> Array:
    """`t - i` of a tile, keys along sublanes."""
    start = (at.pair.query - at.pair.key) * at.sizes.block + queries.start
    t = lax.broadcasted_iota(jnp.int32, (1, queries.size), 1) + start
    return t.astype(jnp.float32) - lax.broadcasted_iota(jnp.int32, (at.sizes.block, 1), 0).astype(jnp.float32)


def _write_bias(bias: Any, at: Visit, log_beta: Any, q_segment: Any, k_segment: Any) -> None:
    """What age and mask add to the logits of a pair: `(t - i) log_beta_i`, or -inf."""
    gate = _column(log_beta[...])
    one_head = at.sizes._replace(groups=1)

    @pl.when(at.pair.masked)
    def _():
        segment, window = _column(k_segment[...]), at.window.astype(jnp.float32)

        def write(_, queries):
            age = _age(at, queries)
            visible = (age >= 0) & (age < window) & (segment == q_segment[:, queries])
            bias[:, queries] = jnp.where(visible, age * gate, -jnp.inf)

        _over_stripes(write, one_head)

    @pl.when(jnp.logical_not(at.pair.masked))
    def _():
        def write(_, queries):
            bias[:, queries] = _age(at, queries) * gate

        _over_stripes(write, one_head)


def _weights(
    keys: Array, values: Array, q: Array, do: Array, lse: Array, delta: Array, bias: Array, at: Visit
) -> tuple[Array, Array]:
    """The weights of a tile, made again from the log-sum-exp, and the gradient of its logits."""
    p = jnp.exp(dot(keys, q, 1, 1) * at.sizes.scale + bias - lse)
    return p, p * (dot(values, do, 1, 1) - delta)


class _Output(NamedTuple):
    by: Literal["query", "key"]  # whose tokens
    axis: int  # of the tokens
    shape: tuple[int, ...]
    dtype: Any


def _spec(sizes: Sizes, by: Literal["query", "key"], axis: int, shape: tuple[int, ...], share: int = 1) -> pl.BlockSpec:
    """One program's block of an array: its row, `share` of which have one in common, and its query or key tokens."""

    def index(row, step, codes, reach, window):
        pair = pair_at(codes, row, step, heads=sizes.heads, blocks=sizes.blocks)
        token = pair.query if by == "query" else pair.key
        return row // share, *(token if a == axis else 0 for a in range(1, len(shape)))

    return pl.BlockSpec((None, *(sizes.block if a == axis else shape[a] for a in range(1, len(shape)))), index)


def _call(
    kernel: Callable[..., None],
    name: str,
    x: Inputs,
    pairs: Pairs,
    sizes: Sizes,
    *backward: Array,
    outputs: list[_Output],
    scratch: list[tuple[int, ...]],
    products: int,
    by_key: bool = False,
) -> tuple[Array, ...]:
    """Runs one kernel. `backward`: do, lse and delta; `products`: matmuls of a tile."""
    (BK, G, _, H), n = x.q.shape, sizes.blocks

    def body(codes, reach, window, *refs):
        kernel(_visit(codes, reach, window, sizes, by_key=by_key), *refs)

    arrays = (x.q, x.k, x.v, x.log_beta, x.segment_ids, x.segment_ids, *backward)
    # Under shard_map all results vary as the queries do.
    varying = jax.typeof(x.q).manual_axis_type
    results = [jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=varying) for o in outputs]
    logits = BK * G * n * (n + 1) // 2 * sizes.block**2  # of all causal tiles: too many where some are left out
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *results))
    return pl.pallas_call(
        body,
        results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(BK, pairs.steps),
            in_specs=[
                _spec(sizes, "query", 2, x.q.shape),
                _spec(sizes, "key", 1, x.k.shape),
                _spec(sizes, "key", 1, x.v.shape),
                _spec(sizes, "key", 2, x.log_beta.shape),
                _spec(sizes, "query", 2, x.segment_ids.shape, share=sizes.heads),
                _spec(sizes, "key", 2, x.segment_ids.shape, share=sizes.heads),
                *(_spec(sizes, "query", axis, a.shape) for axis, a in zip((2, 3, 3), backward, strict=False)),
            ],
            out_specs=[_spec(sizes, o.by, o.axis, o.shape) for o in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=2 * products * H * logits, transcendentals=logits, bytes_accessed=moved),
        name=name,
    )(pairs.codes, pairs.reach, pairs.window, *arrays)

"""What every implementation of attention over the buffer must compute: a dense float64 softmax over exactly the keys
that each head holds."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from buffer_cases import KINDS, SLOTS, B, K, R, attend, dense, make, with_other_slots, with_window
from implementations import params

from retention_jax.kernels import (
    blocks,
    buffer_attention_tpu,
    buffer_attention_triton,
    buffer_attention_xla,
    ops,
    retention_attention_tpu,
    retention_attention_triton,
    retention_attention_xla,
    triton_blocks,
)

BF16 = ml_dtypes.bfloat16
XLA = buffer_attention_xla.buffer_attention
# Blocks so small that pool, window and new tokens are several; the pool's second block begins inside its first.
TPU = functools.partial(
    buffer_attention_tpu.buffer_attention,
    blocks=blocks.BufferBlocks(tokens=4, pool=256, piece=128, recent=16, recent_piece=16),
)
# Few programs, or the interpreter takes long.
TRITON = functools.partial(
    buffer_attention_triton.buffer_attention,
    blocks=triton_blocks.BufferBlocks(programs=12, keys=16, rows=16, num_warps=4),
)
everyone = pytest.mark.parametrize("op", params({"xla": XLA, "tpu": TPU, "triton": TRITON}))


@pytest.mark.parametrize("op", params({"xla": XLA, "tpu": buffer_attention_tpu.buffer_attention, "triton": TRITON}))
def test_by_hand(op):
    # One head of size 4, scale 1/2. Pool slots 1 and 2 and the first recent token are its own: logits 0, log 3 and
    # log 4, so weights 1/8, 3/8 and 4/8.
    x = lambda *values: jnp.array(values, jnp.float32)[:, None] * jnp.eye(4, dtype=jnp.float32)[:1]
    part = op(
        x(2.0)[None, :, None],
        pool_k=x(9.0, 0.0, np.log(3), 9.0)[None],
        pool_v=x(100.0, 8.0, 16.0, 100.0)[None],
        offset=jnp.array([[1, 3]], jnp.int32),
        recent_k=x(np.log(4), 9.0)[None, None, None],
        recent_v=x(24.0, 100.0)[None, None, None],
        recent_range=jnp.array([[0, 1]], jnp.int32),
        layer=jnp.int32(0),
    )
    np.testing.assert_allclose(part.out.ravel(), [1 + 6 + 12, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(part.lse.ravel(), [np.log(8)], rtol=1e-5)


# Fewer cases than for plain XLA below: an interpreted kernel is slow.
@everyone
@pytest.mark.parametrize("T, groups, kind", [(1, 1, "ragged"), (1, 8, "empty heads"), (7, 3, "one owns all")])
def test_equals_a_dense_softmax(op, T, groups, kind):
    x = make(0, kind, T, groups, (0, 17, R), recent_begin=(0, 16, 3))
    out = attend(op, x)
    np.testing.assert_allclose(out, dense(x), rtol=2e-5, atol=2e-5)
    # What no head of the layer holds. Kernels leave it out whatever it is; plain XLA multiplies it by 0.
    np.testing.assert_array_equal(attend(op, with_other_slots(x, 1e4 if op is XLA else np.nan)), out)


@everyone
@pytest.mark.parametrize("T, size", [(1, 40), (7, 9), (7, np.iinfo(np.int32).max)])
def test_a_sliding_window_hides_older_keys(op, T, size):
    # Of a window that devices share out, each has some tokens, perhaps none.
    x = with_window(make(T, "ragged", T, 2, (5, 20, R), recent_begin=(5, 0, 17)), 0, size)
    np.testing.assert_allclose(attend(op, x), dense(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("op", params({"tpu": TPU, "triton": TRITON}))
@pytest.mark.parametrize("H, dtype", [(64, np.float32), (96, BF16), (128, BF16), (256, np.float32)])
def test_loses_no_more_than_plain_xla(op, H, dtype: Any):
    x = make(H, "ragged", 3, 2, (2, 0, R), dtype, H)
    want = dense(x)
    of_op, of_plain = (np.abs(attend(o, x).astype(np.float64) - want).max() for o in (op, XLA))
    assert of_op <= 2 * of_plain + 4e-6 * np.abs(want).max()


@pytest.mark.one_version
def test_triton_merges_any_number_of_parts():
    programs = 3 * (buffer_attention_triton.PARTS + 8)
    many = triton_blocks.BufferBlocks(programs=programs, keys=16, rows=16, num_warps=4)
    x = make(0, "one owns all", 1, 1, (0, 3, R))
    out = attend(functools.partial(buffer_attention_triton.buffer_attention, blocks=many), x)
    np.testing.assert_allclose(out, dense(x), rtol=2e-5, atol=2e-5)


@everyone
def test_logits_of_any_size(op):
    x = make(1, "ragged", 7, 2, (2, 0, R))
    x["q"] *= 1000  # logits of some thousands, which float32 holds to 2e-4
    np.testing.assert_allclose(attend(op, x), dense(x), rtol=0, atol=5e-3)


CAUSAL = {
    "xla": retention_attention_xla.retention_attention_with_lse,
    "tpu": functools.partial(
        retention_attention_tpu.retention_attention_with_lse, blocks=blocks.AttentionBlocks(tokens=128, stripe=128)
    ),
    "triton": functools.partial(
        retention_attention_triton.retention_attention_with_lse,
        blocks=triton_blocks.AttentionBlocks(tokens=64, forward=32, backward=32, num_warps=4),
    ),
}


@pytest.mark.parametrize("op", params(CAUSAL))
@pytest.mark.parametrize("size", (None, 40))
def test_new_tokens_among_themselves(op, size, monkeypatch):
    rng, T = np.random.default_rng(0), 150
    q, k, v = (rng.normal(size=(2, T, heads, 8)).astype(np.float32) for heads in (2, 1, 1))
    monkeypatch.setattr(ops.retention_attention_xla, "retention_attention_with_lse", op)
    # A function of its own: what was compiled for another implementation would run again.
    part = jax.jit(lambda *x: ops.causal_attention(*x))(q, k, v, None if size is None else jnp.int32(size))
    age = np.arange(T)[:, None] - np.arange(T)[None]
    logits = np.einsum("btnh,bsh->btns", q.astype(np.float64), k[:, :, 0]) * 8**-0.5
    logits = np.where(((age >= 0) & (age < (size or T)))[:, None], logits, -np.inf)
    mass = np.exp(logits).sum(axis=-1)
    np.testing.assert_allclose(part.lse, np.log(mass), rtol=1e-5, atol=1e-5)
    want = np.einsum("btns,bsh->btnh", np.exp(logits), v[:, :, 0]) / mass[..., None]
    np.testing.assert_allclose(part.out, want, rtol=2e-5, atol=2e-5)


@everyone
def test_without_a_key_a_part_weighs_nothing(op):
    x = {name: jnp.asarray(a) for name, a in make(0, "empty", 2, 2, (0, 0, 0)).items() if name not in ("k", "v")}
    part = op(**x)
    np.testing.assert_array_equal(part.out, np.zeros((B, 2, 2 * K, 8)))
    np.testing.assert_array_equal(part.lse, np.full((B, 2, 2 * K), -np.inf))
    np.testing.assert_array_equal(ops.merge([part, part]).out, part.out)


@pytest.mark.parametrize("T, groups, kind", list(itertools.product((1, 7), (1, 2, 4), KINDS)))
def test_xla_equals_a_dense_softmax(T, groups, kind):
    for seed, recent_len in enumerate(((0, 1, R), (R, 0, 3))):
        x = make(seed, kind, T, groups, recent_len)
        np.testing.assert_allclose(attend(XLA, x), dense(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("T, kind", list(itertools.product((1, 7), KINDS)))
def test_xla_hides_keys_older_than_a_sliding_window(T, kind):
    for seed, size in enumerate((1, 3, 7, 40, np.iinfo(np.int32).max)):
        x = make(seed, kind, T, 2, (0, 3, R), recent_begin=(0, 3 - seed % 4, seed))
        slid = with_window(x, seed, size)
        np.testing.assert_allclose(attend(XLA, slid), dense(slid), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(attend(XLA, slid), attend(XLA, x), rtol=1e-5, atol=1e-6)  # the last one hides nothing


@pytest.mark.parametrize("length", range(R + 1))
def test_recent_windows_of_every_length(length):
    x = make(length, "ragged", 1, 2, (length, R - length, 0))
    np.testing.assert_allclose(attend(XLA, x), dense(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("T", (1, 7))
def test_bfloat16_is_as_good_as_a_dense_softmax_of_its_inputs(T):
    # Rounding of inputs and output alone, everything between in float64, is the error nobody can avoid.
    exact = make(2, "ragged", T, 2, (2, 0, R))
    rounded = make(2, "ragged", T, 2, (2, 0, R), dtype=ml_dtypes.bfloat16)
    want = dense(exact)
    error = lambda out: np.abs(out.astype(np.float64) - want).max()
    assert error(attend(XLA, rounded)) <= 1.5 * error(dense(rounded).astype(ml_dtypes.bfloat16)) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_cost_follows_live_entries(kind, monkeypatch):
    # The loop over the pool makes one step for each block of each head, in the row that has most of them.
    x = make(3, kind, 1, 2, (0, 0, 0))
    block = buffer_attention_xla.block_size(SLOTS, K)
    trips, loop = [], jax.lax.fori_loop

    def counting_loop(lower, upper, body, init):
        trips.append(int(upper) - int(lower))
        return loop(lower, upper, body, init)

    monkeypatch.setattr(jax.lax, "fori_loop", counting_loop)
    q = jnp.asarray(x["q"]).reshape(B, K, 2, -1)
    buffer_attention_xla._pool_part(q, jnp.asarray(x["pool_k"]), jnp.asarray(x["pool_v"]), jnp.asarray(x["offset"]))
    blocks = [sum(-(-n // block) for n in np.diff(row).tolist()) for row in x["offset"]]
    assert trips == [max(blocks)]
    assert max(blocks) <= SLOTS // block + K  # never heads times the fullest one


def test_refuses_more_slots_than_it_can_number():
    many = {name: jax.ShapeDtypeStruct((2, 2**30, 8), jnp.float32) for name in ("pool_k", "pool_v")}
    x = {name: a for name, a in make(0, "empty", 1, 1, (0,) * B).items() if name not in ("k", "v", "layer")}
    two = {name: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype) for name, a in x.items()} | many
    with pytest.raises(ValueError, match=r"numbers slots with 32 bits: at most 2147483647, got 2 \* 1073741824"):
        jax.eval_shape(XLA, two.pop("q"), **two, layer=jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize("slots, heads", list(itertools.product((1, 5, 16, 1000, 10**6), (1, 2, 8))))
def test_blocks_fit_the_pool(slots, heads):
    block = buffer_attention_xla.block_size(slots, heads)
    assert 1 <= block <= min(slots, 256)

"""What every implementation of retention attention must compute: numbers by hand, then all against `reference`."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import NAMES, assert_as_good_as, make, value_and_grads
from implementations import params
from seeds import generator

from retention_jax.kernels import (
    blocks,
    reference,
    retention_attention_tpu,
    retention_attention_triton,
    retention_attention_xla,
    triton_blocks,
)

pytestmark = pytest.mark.one_version

# Blocks so small that 300 tokens are three of them, the last one not full.
TPU = partial(retention_attention_tpu.retention_attention, blocks=blocks.AttentionBlocks(tokens=128, stripe=128))
TRITON = partial(
    retention_attention_triton.retention_attention,
    blocks=triton_blocks.AttentionBlocks(tokens=64, forward=32, backward=32, num_warps=4),
)
KERNELS = {"xla": retention_attention_xla.retention_attention, "tpu": TPU, "triton": TRITON}
PARAMS = params(KERNELS)
every_kernel = pytest.mark.parametrize("op", PARAMS)
everyone = pytest.mark.parametrize("op", [pytest.param(reference.retention_attention, id="reference"), *PARAMS])


@everyone
def test_by_hand(op):
    # H = 1, q = 1, k = (ln 2, 0, 0), beta = (1/2, 1/4, 0), v = (6, 12, 3): weights are e^(q k) beta^age.
    # t = 0: only itself                                                 -> 6
    # t = 1: 2 * 1/2 = 1 and 1                                           -> (6 + 12) / 2 = 9
    # t = 2: 2 * 1/4 = 1/2, 1 * 1/4 and its own 1 whatever its beta      -> (3 + 3 + 3) / (7/4) = 36/7
    tensor = lambda *x: jnp.array(x, jnp.float32).reshape(1, 3, 1, 1)
    log_beta = jnp.array([[[-math.log(2), -math.log(4), -math.inf]]], jnp.float32)
    inputs = tensor(1, 1, 1), tensor(math.log(2), 0, 0), tensor(6, 12, 3), log_beta
    op = jax.jit(op)
    out = op(*inputs, jnp.zeros((1, 3), jnp.int32))
    np.testing.assert_allclose(out.ravel(), [6, 9, 36 / 7], rtol=1e-6)
    # A document that begins at t = 1: 12, then (1/4 * 12 + 3) / (5/4) = 24/5.
    out = op(*inputs, jnp.array([[7, 3, 3]], jnp.int32))
    np.testing.assert_allclose(out.ravel(), [6, 12, 24 / 5], rtol=1e-6)


@everyone
def test_a_window_by_hand(op):
    # Equal logits, v = (6, 12, 3, 9): each token takes the mean of itself and the one before.
    zeros = jnp.zeros((1, 4, 1, 1))
    v = jnp.array([6.0, 12, 3, 9]).reshape(1, 4, 1, 1)
    out = op(zeros, zeros, v, jnp.zeros((1, 1, 4)), jnp.ones((1, 4), jnp.int32), jnp.int32(2))
    np.testing.assert_allclose(out.ravel(), [6, 9, 7.5, 6], rtol=1e-6)


def by_loop(q, k, v, log_beta, segment_ids):
    out = np.zeros_like(q)
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        head, weights = n // (q.shape[2] // k.shape[2]), np.zeros(t + 1)
        for i in range(t + 1):
            decay = (t - i) * log_beta[b, head, i] if i < t else 0.0
            if segment_ids[b, i] == segment_ids[b, t]:
                weights[i] = np.exp(q[b, t, n] @ k[b, i, head] * q.shape[3] ** -0.5 + decay)
        out[b, t, n] = weights @ v[b, : t + 1, head] / weights.sum()
    return out


def test_reference_against_a_loop_and_its_differences():
    inputs, cotangent = make(0, B=2, T=7, groups=2)
    with jax.enable_x64(True):
        out, grads = value_and_grads(reference.retention_attention, inputs, cotangent)
    np.testing.assert_allclose(out, by_loop(*inputs), rtol=1e-12)
    for i, (name, grad) in enumerate(zip(NAMES, grads, strict=True)):
        # Along one direction, in which every number counts.
        direction = generator(i).normal(size=grad.shape)
        moved = lambda step, i=i, d=direction: by_loop(*(x + step * d if j == i else x for j, x in enumerate(inputs)))
        slope = ((moved(1e-5) - moved(-1e-5)) / 2e-5 * cotangent).sum()
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-7, err_msg=name)


# Sequences, key/value heads, query heads of each, head size, tokens: one, part of a block, several blocks.
CASES = [
    (2, 2, 1, 64, 130, jnp.bfloat16),
    (1, 1, 4, 128, 300, jnp.bfloat16),
    (1, 1, 5, 96, 70, np.float32),
    (1, 2, 6, 64, 1, np.float32),
    (1, 1, 3, 256, 40, np.float32),
    (1, 1, 7, 64, 40, np.float32),
    (1, 1, 8, 64, 40, jnp.bfloat16),
]
# Blocks of two stripes.
STRIPED = partial(retention_attention_tpu.retention_attention, blocks=blocks.AttentionBlocks(tokens=256, stripe=128))


@pytest.mark.parametrize("op", params({**KERNELS, "tpu": STRIPED}))
@pytest.mark.parametrize("B, K, groups, H, T, dtype", CASES)
def test_loses_no_more_than_the_reference(op, B, K, groups, H, T, dtype: Any):
    inputs, cotangent = make(T + groups, B, T, groups, dtype, K, H)
    assert_as_good_as(reference.retention_attention, op, inputs, cotangent)


@every_kernel
def test_a_window_and_documents_whose_ids_come_in_any_order(op):
    """Ids that fall, repeat after others, and change in the middle of blocks."""
    (*x, _), cotangent = make(4, B=1, T=300, groups=1, dtype=np.float32, K=1, H=8)
    segment_ids = np.repeat(np.array([[9, 2, 2, 7, 2, -1]], np.int32), 50, axis=1)
    slide = lambda op: lambda *x: op(*x, jnp.int32(140))
    assert_as_good_as(slide(reference.retention_attention), slide(op), (*x, segment_ids), cotangent)


@everyone
def test_keys_that_never_fade_and_keys_that_vanish_at_once(op):
    """The first head is ordinary attention, in the second every token sees itself alone."""
    (q, k, v, log_beta, segment_ids), cotangent = make(2, B=1, T=200, groups=2, dtype=np.float32)
    log_beta = np.zeros_like(log_beta)
    log_beta[:, 1] = -np.inf
    out, grads = value_and_grads(op, (q, k, v, log_beta, segment_ids), cotangent)

    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    ordinary = lambda *x: jax.nn.dot_product_attention(*x, mask=jnp.asarray(same), is_causal=True)
    want, vjp = jax.vjp(ordinary, q[:, :, :2], k[:, :, :1], v[:, :, :1])
    np.testing.assert_allclose(out[:, :, :2], want, rtol=2e-5, atol=2e-5)
    for g, w, heads in zip(grads, vjp(cotangent[:, :, :2]), (2, 1, 1), strict=False):
        np.testing.assert_allclose(g[:, :, :heads], w, rtol=1e-4, atol=1e-5 * float(jnp.abs(w).max()))

    np.testing.assert_array_equal(out[:, :, 2:], np.repeat(v[:, :, 1:], 2, axis=2))
    np.testing.assert_allclose(grads[2][:, :, 1], cotangent[:, :, 2] + cotangent[:, :, 3], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(grads[3][:, 1], np.zeros_like(log_beta[:, 1]))


@every_kernel
def test_under_vmap_and_a_scan_over_layers(op):
    inputs, _ = make(6, B=1, T=140, groups=1, dtype=np.float32, K=1)
    q, k, v, log_beta, segment_ids = map(jnp.asarray, inputs)
    gates = jnp.stack([log_beta, 2 * log_beta])
    # jax.checkpoint refuses the interpreter's callbacks; TPU kernels are lowered under it in `test_compile_tpu.py`.
    remat = (lambda f: f) if op is TPU else jax.checkpoint

    def loss(op, q, gates):
        layer = remat(lambda h, gate: (h + op(h, k, v, gate, segment_ids), None))
        return (jax.lax.scan(layer, q, gates)[0] ** 2).sum()

    queries = jnp.stack([q, -q])
    want, got = (
        jax.jit(jax.vmap(jax.grad(lambda q, g, op=op: loss(op, q, g), (0, 1)), (0, None)))(queries, gates)
        for op in (reference.retention_attention, op)
    )
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4 * float(jnp.abs(w).max()))


@everyone
def test_refuses_heads_that_do_not_divide(op):
    tensor = lambda heads: jnp.zeros((1, 4, heads, 8))
    with pytest.raises(ValueError, match="multiple of key/value heads, got 3 and 2"):
        op(tensor(3), tensor(2), tensor(2), jnp.zeros((1, 2, 4)), jnp.zeros((1, 4), jnp.int32))


def test_triton_refuses_more_blocks_than_it_can_number():
    T = 64 * 32767 + 1
    heads, rest = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)
    with pytest.raises(ValueError, match=f"blocks with 16 bits: of 64 tokens they hold {T - 1}, got {T} tokens"):
        jax.eval_shape(TRITON, heads, heads, heads, jax.ShapeDtypeStruct((1, 1, T), jnp.float32), rest)

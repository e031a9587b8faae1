"""What holds of the blockwise XLA implementation alone: float64, log-sum-exp, memory on a CPU, its block size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import NAMES, assert_close, make, value_and_grads

from retention_jax.kernels import reference, retention_attention_xla


# One token, one block, several that T does not fill.
@pytest.mark.parametrize("T", [1, 40, 300])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_blockwise_is_the_reference(T, groups):
    inputs, cotangent = make(T + groups, B=2, T=T, groups=groups)
    with jax.enable_x64(True):
        want = value_and_grads(reference.retention_attention, inputs, cotangent)
        got = value_and_grads(retention_attention_xla.retention_attention, inputs, cotangent)
    assert all(np.isfinite(w).all() for w in want[1])
    assert_close(got, want, 1e-11)


@pytest.mark.parametrize("size", [3, 140])
def test_blockwise_is_the_reference_within_a_window(size):
    inputs, cotangent = make(size % 97, B=2, T=300, groups=2)
    with jax.enable_x64(True):
        slide = lambda op: lambda *x: op(*x, jnp.int32(size))
        want = value_and_grads(slide(reference.retention_attention), inputs, cotangent)
        got = value_and_grads(slide(retention_attention_xla.retention_attention), inputs, cotangent)
    assert_close(got, want, 1e-11)


def test_log_sum_exp_and_its_gradient():
    inputs, _ = make(1, B=2, T=140, groups=2)
    *x, segment_ids = inputs
    segment_ids = jnp.asarray(segment_ids)

    def with_reference(q, k, v, log_beta):
        logits = jnp.einsum("btkgh,bikh->bkgti", q.reshape(2, 140, 2, 2, 4), k) / 2
        age = np.arange(140)[:, None] - np.arange(140)[None, :]
        visible = (age >= 0)[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
        decay = jnp.where((age > 0)[None, None], age.astype(float)[None, None] * log_beta[:, :, None, :], 0.0)
        logits = jnp.where(visible[:, None, None], logits + decay[:, :, None], -jnp.inf)
        return jax.nn.logsumexp(logits, axis=-1).reshape(2, 4, 140)

    with jax.enable_x64(True):
        weight = jnp.cos(jnp.arange(2 * 4 * 140.0)).reshape(2, 4, 140)
        with_op = lambda *x: retention_attention_xla.retention_attention_with_lse(x[0], x[1], x[2], x[3], segment_ids)[
            1
        ]
        run = lambda f: jax.jit(jax.value_and_grad(lambda *x: (f(*x) * weight).sum(), (0, 1, 2, 3)))(*x)
        (got, got_grads), (want, want_grads) = run(with_op), run(with_reference)
    np.testing.assert_allclose(got, want, rtol=1e-11)
    for name, g, w in zip(NAMES, got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10 * max(1.0, np.abs(w).max()), err_msg=name)


def test_memory_grows_with_length():
    def temporaries(T):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        tensors = shape(1, T, 4, 8), shape(1, T, 2, 8), shape(1, T, 2, 8), shape(1, 2, T)
        loss = lambda *x: retention_attention_xla.retention_attention(*x).sum()
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
        memory = run.lower(*tensors, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    sizes = [temporaries(T) for T in (1024, 4096, 16384)]
    assert sizes[1] <= 1.3 * 4 * sizes[0] and sizes[2] <= 1.3 * 4 * sizes[1], sizes


@pytest.mark.parametrize("length", [1, 7, 8, 100, 128, 129, 192, 1000, 2048])
def test_block_size_wastes_little(length):
    block = retention_attention_xla.block_size(length)
    blocks = -(-length // block)
    assert block <= retention_attention_xla.LARGEST_BLOCK and block % retention_attention_xla.ROUND == 0
    assert blocks * block - length < blocks * retention_attention_xla.ROUND

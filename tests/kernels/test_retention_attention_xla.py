"""What holds of the blockwise XLA implementation alone: float64, log-sum-exp, memory on a CPU, its block size."""

import re

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


def steps_of(seen):
    """For each block of queries how often it is a step, the blocks of keys it reads, and the first of them."""
    n = len(seen)

    def step(size, i, first, state):
        count, sizes, begin = state
        return count.at[i].add(1), sizes.at[i].set(size), begin.at[i].set(first)

    zeros = jnp.zeros(n, jnp.int32)
    run = jax.jit(lambda seen: retention_attention_xla.over_query_blocks(step, (zeros, zeros, zeros), seen))
    return tuple(np.asarray(a) for a in run(jnp.asarray(seen)))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40])
def test_every_block_of_queries_is_one_step_that_reads_all_it_sees(n):
    rng, index = np.random.default_rng(n), np.arange(n)
    for share in (0.0, 0.1, 1.0):
        seen = np.tril(rng.random((n, n)) < share) | np.eye(n, dtype=bool)
        count, size, first = steps_of(seen)
        np.testing.assert_array_equal(count, np.ones(n))
        needed = index + 1 - seen.argmax(axis=1)
        assert (first >= 0).all() and (first + size <= n).all()
        assert (first <= seen.argmax(axis=1)).all() and (first + size > index).all()
        # Never more than the next size.
        sizes = np.array(retention_attention_xla.key_sizes(n))
        np.testing.assert_array_equal(size, sizes[np.searchsorted(sizes, needed)])


@pytest.mark.parametrize("n", [1, 5, 8, 16, 100, 256, 1000])
def test_key_sizes_are_few_and_waste_little(n):
    sizes = np.array(retention_attention_xla.key_sizes(n))
    assert sizes[0] == 1 and sizes[-1] == n and (np.diff(sizes) > 0).all() and len(sizes) <= 8 + 2 * np.log2(n)
    needed = np.arange(1, n + 1)  # one document, no window
    taken = sizes[np.searchsorted(sizes, needed)]
    assert taken.sum() <= 1.14 * needed.sum()
    assert (taken <= np.maximum(2 * needed, 1)).all()


def test_windows_and_documents_save_blocks():
    see = lambda segment, window: np.asarray(
        retention_attention_xla.visible_blocks(jnp.asarray(segment)[None], window and jnp.int32(window), 4)
    )
    one = np.ones(24, np.int32)
    np.testing.assert_array_equal(see(one, None), np.tril(np.ones((6, 6), bool)))
    # A window of 5 reaches from a block's first token to the first of the block before; one of 6 reaches further.
    for window, apart in ((1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3)):
        want = np.tril(np.ones((6, 6), bool)) & ~np.tril(np.ones((6, 6), bool), -apart - 1)
        np.testing.assert_array_equal(see(one, window), want)
    # Documents of 8, 6 and 10 tokens: blocks 0 1 | 2 3 | 3 4 5.
    documents = see(np.repeat([3, 1, 2], (8, 6, 10)), None)
    want = [[0], [0, 1], [2], [2, 3], [3, 4], [3, 4, 5]]
    assert [np.flatnonzero(row).tolist() for row in documents] == want


def test_steps_are_no_more_than_blocks():
    """Compiled, forward and backward: a loop for each size and pass, in which there is no other loop."""
    T = 2048
    n = T // retention_attention_xla.block_size(T)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tensors = shape(1, T, 4, 8), shape(1, T, 2, 8), shape(1, T, 2, 8), shape(1, 2, T)
    loss = lambda *x: retention_attention_xla.retention_attention(*x).sum()
    lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*tensors, jax.ShapeDtypeStruct((1, T), jnp.int32))
    text = lowered.compile().as_text() or ""
    loops = [line for line in text.splitlines() if re.search(r"\bwhile\(", line)]
    assert 0 < len(loops) <= 2 * len(retention_attention_xla.key_sizes(n))
    assert not any("/while/body" in line for line in loops), loops
    # Together they take each block once: `test_every_block_of_queries_is_one_step_that_reads_all_it_sees`.
    assert n <= T / 128

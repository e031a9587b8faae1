"""Which implementation runs: decided once, forced by one variable, and never another than what was asked for."""

from typing import Any, get_args

import buffer_cases
import evict_cases
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention_jax.config import CacheConfig
from retention_jax.generation import decoding
from retention_jax.kernels import buffer_attention_triton, ops, reference, triton_blocks, triton_call


@pytest.fixture
def forced(monkeypatch):
    """Sets the variable, or removes it, and lets the decision be made anew, here and after the test."""

    def force(value):
        monkeypatch.delenv(ops.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(ops.VARIABLE, value)
        ops.implementation.cache_clear()

    yield force
    monkeypatch.undo()
    ops.implementation.cache_clear()


@pytest.mark.parametrize("asked, runs", [("tpu", "tpu"), ("triton", "triton"), ("xla", "xla"), (None, "xla")])
def test_what_is_asked_for_runs_and_xla_on_a_cpu(forced, monkeypatch, asked, runs):
    monkeypatch.setattr(triton_call, "check_available", lambda: None)  # the interpreter needs no GPU
    forced(asked)
    assert ops.implementation() == runs
    ran = []
    for name in get_args(ops.Implementation):
        attention, mass = getattr(ops, f"retention_attention_{name}"), getattr(ops, f"retention_mass_{name}")
        monkeypatch.setattr(attention, "retention_attention", lambda *x, name=name: ran.append((name, len(x))) or x[0])
        monkeypatch.setattr(mass, "retention_mass", lambda *x, name=name: ran.append((name, len(x))) or x[0])
    heads, ids = jnp.zeros((1, 8, 1, 8)), jnp.zeros((1, 8), jnp.int32)
    ops.retention_attention(heads, heads, heads, jnp.zeros((1, 1, 8)), ids, jnp.int32(4))
    ops.retention_mass(jnp.zeros((1, 1, 8)), ids)
    assert ran == [(runs, 6), (runs, 2)]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_the_operations_of_training_are_the_reference():
    """retention_attention, retention_mass and causal_attention, the latter with nothing that fades."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    log_beta = jnp.asarray(-np.exp(rng.normal(size=(2, 2, 9))), jnp.float32)
    ids = jnp.asarray(np.arange(9)[None] * np.array([[2], [3]]) // 9, jnp.int32)
    for window in (None, jnp.int32(3)):
        args = q, k, v, log_beta, ids, window
        close(ops.retention_attention(*args), reference.retention_attention(*args))
        plain = reference.retention_attention(q, k, v, jnp.zeros_like(log_beta), jnp.ones_like(ids), window)
        close(ops.causal_attention(q, k, v, window).out, plain)
        close(ops.causal_attention(q[:, :1], k[:, :1], v[:, :1], window).out, plain[:, :1])
    close(ops.retention_mass(log_beta, ids), reference.retention_mass(log_beta, ids))


@pytest.mark.parametrize("window", (None, 9))
def test_buffer_attention_is_the_reference(window):
    x = buffer_cases.make(0, "ragged", 7, 2, (0, 17, buffer_cases.R), recent_begin=(0, 16, 3))
    x = {name: jnp.asarray(a) for name, a in x.items() if name not in ("k", "v")}
    if window is not None:
        x = buffer_cases.with_window(jax.tree.map(np.asarray, x), 0, window)
    got, want = (jax.jit(f)(**x) for f in (ops.buffer_attention, reference.buffer_attention))
    close(got.out, want.out)
    close(got.lse, want.lse)


LAYERS_DIFFER = jnp.array([[9, 9, 2, 2], [1, 1, 1, 1], [50, 50, 0, 0]], jnp.int32)
WHO_COMPETES: dict[str, Any] = {
    "all entries": dict(capacity=60, groups=1, heads_of_group=4),
    "those of a head": dict(capacity=9, groups=4, heads_of_group=1),
    "those of a layer's heads": dict(capacity=25, groups=2, heads_of_group=2),
    "those of a head, of which some have more room": dict(capacity=LAYERS_DIFFER, groups=4, heads_of_group=1),
}


@pytest.mark.parametrize("kernels", ["tpu", "triton", "xla"])
@pytest.mark.parametrize("scores", ("spread", "tied"))
def test_evictions_are_the_reference(forced, monkeypatch, kernels, scores):
    """select_top, pack_order and pack_rows, bitwise."""
    monkeypatch.setattr(triton_call, "check_available", lambda: None)
    forced(kernels)
    heads, slots, recent = 4, 90, 20
    x = evict_cases.make(1, [[5, 60, 11, 0], [0, 0, 0, 0], [20, 20, 20, 20]], slots, recent, scores)
    pool, new = (evict_cases.any_bytes(i, np.float32, 3, n, 16) for i, n in ((2, slots), (3, heads * recent)))
    pool, new, score, pos, head, live, offset = map(jnp.asarray, (pool, new, *x[:5]))

    def packed(keep):
        order, where = ops.pack_order(keep, head, offset, recent)
        return np.asarray(ops.pack_rows(pool, new, order)), np.asarray(where)

    for groups in WHO_COMPETES.values():
        keep = ops.select_top(score, pos, head, live, **groups, shared=heads * recent)
        np.testing.assert_array_equal(keep, reference.select_top(score, pos, head, live, **groups))
        (got, where), (want, wanted) = packed(keep), reference.pack(keep, head, pool, new, heads)
        np.testing.assert_array_equal(where, wanted)
        assert got.tobytes() == np.asarray(want).tobytes()


def test_an_eviction_by_hand():
    # Head 0 owns two slots of three, nobody the third; then one new token of each of two heads. After 3 tokens ages are
    # 4, 3 and 2, and scores -4, -1.5, -2 and -2.2. There are three slots: the entry of score -4 goes.
    flat = lambda *a: jnp.asarray([a], jnp.float32)
    whole = lambda *a: jnp.asarray([a], jnp.int32)
    args = (
        flat(-1.0, -0.5, 0.0, -1.0, -1.1),
        whole(0, 1, -1, 2, 2),
        whole(0, 0, 1, 0, 1),
        jnp.asarray([[True, True, False, True, True]]),
        jnp.asarray([3], jnp.int32),
    )
    rows, offset = reference.score_and_evict(*args, flat(10, 11, 12), flat(13, 14), 2)
    assert rows.tolist() == [[11, 13, 14]] and offset.tolist() == [[0, 2, 3]]


@pytest.mark.slow  # interprets every kernel inside a model
@pytest.mark.parametrize("kernels", ["tpu", "triton"])
def test_a_model_reads_and_evicts_with_kernels(forced, monkeypatch, kernels):
    monkeypatch.setattr(triton_call, "check_available", lambda: None)
    # The interpreter takes long for each program.
    few = triton_blocks.BufferBlocks(programs=8, keys=32, rows=16, num_warps=4)
    monkeypatch.setattr(buffer_attention_triton, "buffer_blocks", lambda *_: few)
    model, tokens = helpers.tiny_model(), np.arange(14, dtype=np.int32).reshape(2, 7)

    def run(asked):
        forced(asked)
        jax.clear_caches()  # a compiled program keeps the kernels it was traced with
        with jax.numpy_dtype_promotion("standard"):
            logits, buffer = decoding.prefill(model, tokens, CacheConfig(budget=3, recent=2, prefill_chunk=4))
            for token in ([3, 1], [2, 2], [5, 0]):
                logits, buffer = decoding.decode(model, np.array(token, np.int32), buffer)
        return np.asarray(logits), [buffer.positions(row) for row in range(2)]

    (want, kept), (got, held) = run("xla"), run(kernels)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, held, kept)


@pytest.mark.parametrize("backend, runs", [("tpu", "tpu"), ("gpu", "xla")])
def test_kernels_where_there_are_tpus(forced, monkeypatch, backend, runs):
    forced(None)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert ops.implementation() == runs


def test_decided_once(forced, monkeypatch):
    forced("tpu")
    assert ops.implementation() == "tpu"
    monkeypatch.setenv(ops.VARIABLE, "xla")
    assert ops.implementation() == "tpu"


def test_refuses_an_unknown_name(forced):
    forced("cuda")
    with pytest.raises(ValueError, match="RETENTION_JAX_KERNELS must be one of tpu, triton, xla or absent, got 'cuda'"):
        ops.retention_mass(jnp.zeros((1, 1, 8)), jnp.zeros((1, 8), jnp.int32))


def test_refuses_triton_without_a_gpu(forced):
    forced("triton")
    with pytest.raises(ValueError, match="Triton kernels need a GPU, the backend of this process is cpu"):
        ops.implementation()

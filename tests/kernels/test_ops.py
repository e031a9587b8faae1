"""Which implementation runs: decided once, forced by one variable, and never another than what was asked for."""

from typing import get_args

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention_jax.config import CacheConfig
from retention_jax.generation import decoding
from retention_jax.kernels import buffer_attention_triton, ops, triton_blocks, triton_call


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

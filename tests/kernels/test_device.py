"""The kernels on the hardware they are for, at sizes that are run in earnest, with the blocks that are used then.

    RETENTION_JAX_TEST_DEVICE=1 python -m pytest tests/kernels/test_device.py

Without the variable every test runs on the CPU, and these are left out: interpreters would take hours. The truth is
computed in float64 on the CPU; kernels may lose twice what plain XLA loses on the same device.
"""

import types
from typing import Any

import evict_cases
import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_cases import NAMES, value_and_grads
from attention_cases import make as make_attention
from mass_cases import make as make_mass
from mass_cases import value_and_grad

from retention_jax.config import CacheConfig
from retention_jax.generation import decoding
from retention_jax.kernels import (
    buffer_attention_tpu,
    buffer_attention_triton,
    buffer_attention_xla,
    evict_pack_tpu,
    evict_pack_triton,
    evict_select_tpu,
    evict_xla,
    ops,
    reference,
    retention_attention_tpu,
    retention_attention_triton,
    retention_mass_tpu,
    retention_mass_triton,
)

BACKEND = jax.default_backend()
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(BACKEND not in ("gpu", "tpu"), reason="needs a GPU or a TPU, see the top of the file"),
]

ON_TPU = BACKEND == "tpu"
ATTENTION: Any = (retention_attention_tpu if ON_TPU else retention_attention_triton).retention_attention
MASS: Any = (retention_mass_tpu if ON_TPU else retention_mass_triton).retention_mass
BUFFER: Any = (buffer_attention_tpu if ON_TPU else buffer_attention_triton).buffer_attention
SELECT: Any = (evict_select_tpu if ON_TPU else evict_xla).select_top
PACK: Any = (
    evict_pack_tpu
    if ON_TPU
    else types.SimpleNamespace(pack_order=evict_xla.pack_order, pack_rows=evict_pack_triton.pack_rows)
)


def on_cpu(function, *args):
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*args))


def whole(op):
    """Plain JAX with float32 products of all bits, where a device would take TF32 or passes of bfloat16."""

    def run(*args, **named):
        with jax.default_matmul_precision("highest"):
            return op(*args, **named)

    return run


def largest(got, want) -> float:
    return float(np.abs(np.asarray(got, np.float64) - want).max())


@pytest.mark.parametrize(
    "B, K, groups, H, T, dtype",
    [
        (1, 2, 4, 128, 2048, ml_dtypes.bfloat16),
        (2, 2, 1, 64, 1000, ml_dtypes.bfloat16),
        (1, 1, 8, 256, 513, ml_dtypes.bfloat16),
        (1, 2, 2, 96, 700, np.float32),
    ],
)
def test_retention_attention(B, K, groups, H, T, dtype: Any):
    inputs, cotangent = make_attention(T, B, T, groups, dtype, K, H)
    wide = tuple(x.astype(np.float64) for x in inputs[:4])
    plain = reference.retention_attention
    truth = on_cpu(value_and_grads, plain, (*wide, inputs[4]), cotangent.astype(np.float64))
    by_plain, by_kernel = (jax.tree.leaves(value_and_grads(op, inputs, cotangent)) for op in (whole(plain), ATTENTION))
    for name, want, p, got in zip(("out", *NAMES), jax.tree.leaves(truth), by_plain, by_kernel, strict=True):
        assert largest(got, want) <= 2 * largest(p, want) + 1e-5 * max(1.0, np.abs(want).max()), name


@pytest.mark.parametrize("B, heads, T", [(1, 8, 16384), (2, 3, 1000)])
def test_retention_mass(B, heads, T):
    log_beta, segment_ids, cotangent = make_mass(T, B, heads, T, np.float32)
    plain = reference.retention_mass
    wide = log_beta[:, :1].astype(np.float64), segment_ids, cotangent[:, :1].astype(np.float64)
    truth = on_cpu(value_and_grad, plain, *wide)  # of one head: T x T numbers
    narrow = log_beta[:, :1], segment_ids, cotangent[:, :1]
    by_plain, by_kernel = value_and_grad(plain, *narrow), value_and_grad(MASS, log_beta, segment_ids, cotangent)
    for want, p, got in zip(truth, by_plain, by_kernel, strict=True):
        assert largest(got[:, :1], want) <= 2 * largest(p, want) + 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("T, groups, H", [(1, 4, 128), (1, 8, 64), (256, 4, 128), (33, 2, 96)])
def test_buffer_attention(T, groups, H):
    """Heads of very different sizes, an empty one among them, in a pool that other layers have most of."""
    rng, (B, K, R, slots) = np.random.default_rng(T + H), (2, 4, 128, 9000)
    normal = lambda *shape, scale=1.0: (scale * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)
    x: dict[str, Any] = dict(
        q=normal(B, T, K * groups, H, scale=3.0),
        pool_k=normal(B, slots, H),
        pool_v=normal(B, slots, H),
        offset=np.array([[2000, 5000, 5000, 5003, 6100], [0, 17, 4113, 4200, 9000]], np.int32),
        recent_k=normal(B, 3, K, R, H),
        recent_v=normal(B, 3, K, R, H),
        recent_range=np.array([[0, R], [0, 5]], np.int32),
        layer=np.int32(1),
    )
    want = _dense(x)
    held = jax.tree.map(jnp.asarray, x)
    plain, kernel = (
        jax.jit(lambda x, op=op: op(**x).out)(held) for op in (whole(buffer_attention_xla.buffer_attention), BUFFER)
    )
    assert largest(kernel, want) <= 2 * largest(plain, want) + 1e-5 * np.abs(want).max()
    np.testing.assert_array_equal(kernel, jax.jit(lambda x: BUFFER(**x).out)(held))


def _dense(x: dict[str, Any]) -> np.ndarray:
    x = {name: a if a.dtype == np.int32 else a.astype(np.float64) for name, a in x.items()}
    (B, T, N, H), K = x["q"].shape, x["recent_k"].shape[2]
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for h in range(K):
            pool, recent = slice(*x["offset"][b, h : h + 2]), (b, x["layer"], h, slice(*x["recent_range"][b]))
            keys, values = (np.concatenate([x[f"pool_{name}"][b, pool], x[f"recent_{name}"][recent]]) for name in "kv")
            group = slice(h * N // K, (h + 1) * N // K)
            logits = x["q"][b, :, group] @ keys.T * H**-0.5
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            out[b, :, group] = weights @ values / weights.sum(axis=-1, keepdims=True)
    return out


@pytest.mark.parametrize("scores", ["spread", "tied", "by token"])
def test_eviction(scores):
    """Who survives, and every byte of it, of 36 x 8 heads with 1,024 + 128 entries."""
    rng, heads = np.random.default_rng(5), 36 * 8
    sizes = rng.multinomial(heads * 1024, rng.dirichlet(np.ones(heads))).tolist()
    x = evict_cases.make(6, [sizes], slots=heads * 1024, window=128, scores=scores)
    keep = evict_cases.survivors(x, heads * 1024, 1)
    np.testing.assert_array_equal(evict_cases.select(SELECT, x, heads * 1024, 1), keep)
    pool = evict_cases.any_bytes(7, ml_dtypes.bfloat16, 1, heads * 1024, 128)
    window = evict_cases.any_bytes(8, ml_dtypes.bfloat16, 1, heads * 128, 128)
    (got, offset), (want, want_offset) = (
        evict_cases.pack(PACK, x, keep, pool, window),
        evict_cases.packed(x, keep, pool, window),
    )
    np.testing.assert_array_equal(offset, want_offset)
    assert got.tobytes() == want.tobytes()


def test_a_model_reads_and_evicts(monkeypatch):
    """With kernels as with plain XLA, through `ops`, prefill in chunks and decoding over several evictions."""
    model, tokens = helpers.tiny_model(), np.arange(60, dtype=np.int32).reshape(2, 30) % 16
    results = {}
    for kernels in ("xla", "tpu" if ON_TPU else "triton"):
        monkeypatch.setenv(ops.VARIABLE, kernels)
        ops.implementation.cache_clear()
        jax.clear_caches()
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            logits, buffer = decoding.prefill(model, tokens, CacheConfig(budget=6, recent=4, prefill_chunk=8))
            for token in range(9):
                logits, buffer = decoding.decode(model, np.array([token, 3], np.int32), buffer)
        results[kernels] = np.asarray(logits), [buffer.positions(row) for row in range(2)]
    monkeypatch.undo()
    ops.implementation.cache_clear()
    (want, kept), (got, held) = results.values()
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, held, kept)

"""What holds of the blockwise XLA implementation alone: float64, what it leaves out, memory on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mass_cases import make, value_and_grad

from retention_jax.kernels import reference, retention_attention_xla, retention_mass_xla

OPS = reference.retention_mass, retention_mass_xla.retention_mass


# One token, part of a block, exactly one, several that T does not fill.
@pytest.mark.parametrize("T", [1, 40, retention_attention_xla.LARGEST_BLOCK, 500])
def test_blockwise_is_the_reference(T):
    inputs = make(T, B=2, heads=3, T=T)
    with jax.enable_x64(True):
        want, got = (value_and_grad(op, *inputs) for op in OPS)
    assert np.isfinite(want[1]).all()
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-11 * np.abs(w).max())


def test_leaving_out_what_decayed_changes_no_bit(monkeypatch):
    _, segment_ids, cotangent = make(1, B=1, heads=4, T=900, dtype=np.float32)
    # Everything is gone within one, two, three blocks, or never.
    gates = -(np.array([2.0, 0.6, 0.3, 1e-4], np.float32)[None, :, None] + np.zeros_like(cotangent))
    kept = value_and_grad(retention_mass_xla.retention_mass, gates, np.zeros_like(segment_ids), cotangent)
    asked = []
    monkeypatch.setattr(retention_mass_xla, "_counts", lambda *x: asked.append(x) or jnp.bool_(True))
    everything = value_and_grad(retention_mass_xla.retention_mass, gates, np.zeros_like(segment_ids), cotangent)
    assert asked
    for a, b in zip(kept, everything, strict=True):
        np.testing.assert_array_equal(a, b)


def test_counts_only_what_is_not_zero():
    segment = jnp.zeros((6, 128), jnp.int32)
    for rate, expected in ((2.0, [1, 1, 0, 0, 0, 0]), (0.3, [1, 1, 1, 1, 0, 0]), (1e-4, [1] * 6)):
        gates = jnp.full((6, 128), -rate)
        # 105.3 (104.3 with no margin) / 2.0 = 53 tokens, / 0.3 = 351; the shortest age d blocks apart is 128 d - 127.
        counted = [bool(retention_mass_xla._counts(gates, segment, jnp.int32(5), jnp.int32(5 - d))) for d in range(6)]
        assert counted == [bool(e) for e in expected]


def test_memory_grows_with_length():
    def temporaries(T):
        run = jax.jit(jax.value_and_grad(lambda *x: retention_mass_xla.retention_mass(*x).sum()))
        gates, segments = jax.ShapeDtypeStruct((1, 4, T), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)
        memory = run.lower(gates, segments).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    sizes = [temporaries(T) for T in (1024, 4096, 16384)]
    assert sizes[1] <= 1.3 * 4 * sizes[0] and sizes[2] <= 1.3 * 4 * sizes[1], sizes

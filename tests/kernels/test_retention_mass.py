"""What every implementation of retention mass must compute: numbers by hand, a loop, then all against `reference`."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import params
from mass_cases import make, value_and_grad

from retention_jax.kernels import reference, retention_mass_tpu, retention_mass_triton, retention_mass_xla
from retention_jax.kernels.blocks import MassBlocks

pytestmark = pytest.mark.one_version

# Eight rows of 128 tokens are the smallest chunk: 1500 tokens are two, the second not full.
TPU = partial(retention_mass_tpu.retention_mass, blocks=MassBlocks(rows=8))
KERNELS = {"xla": retention_mass_xla.retention_mass, "tpu": TPU, "triton": retention_mass_triton.retention_mass}
PARAMS = params(KERNELS)
every_kernel = pytest.mark.parametrize("op", PARAMS)
everyone = pytest.mark.parametrize("op", [pytest.param(reference.retention_mass, id="reference"), *PARAMS])


@everyone
def test_by_hand(op):
    # beta = (1/2, 1/4, 0). S_0 = 1, S_1 = 1/2 + 1, S_2 = 1/4 + 1/4 + 1.
    # d(S_0 + S_1 + S_2): age * beta^age = 1/2 + 2 * 1/4 for entry 0, 1/4 for entry 1, nothing for the last.
    log_beta = np.array([[[-math.log(2), -math.log(4), -math.inf]]], np.float32)
    mass, grad = value_and_grad(op, log_beta, np.zeros((1, 3), np.int32), np.ones((1, 1, 3), np.float32))
    np.testing.assert_allclose(mass.ravel(), [1, 1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(grad.ravel(), [1, 0.25, 0], rtol=1e-6)
    # A document that begins at t = 2.
    mass, grad = value_and_grad(op, log_beta, np.array([[5, 5, 2]], np.int32), np.ones((1, 1, 3), np.float32))
    np.testing.assert_allclose(mass.ravel(), [1, 1.5, 1], rtol=1e-6)
    np.testing.assert_allclose(grad.ravel(), [0.5, 0, 0], rtol=1e-6)


def test_reference_against_a_loop():
    log_beta, segment_ids, _ = make(0, B=2, heads=3, T=9)
    want = np.ones_like(log_beta)
    for b, head, t in itertools.product(*map(range, log_beta.shape)):
        for i in range(t):
            if segment_ids[b, i] == segment_ids[b, t]:
                want[b, head, t] += np.exp((t - i) * log_beta[b, head, i])
    with jax.enable_x64(True):
        got = reference.retention_mass(jnp.asarray(log_beta), jnp.asarray(segment_ids))
    np.testing.assert_allclose(got, want, rtol=1e-12)


# One token, part of a row of 128, several rows, several chunks.
@every_kernel
@pytest.mark.parametrize(
    "B, heads, T, dtype", [(1, 1, 1, np.float32), (2, 2, 300, jnp.bfloat16), (1, 2, 1500, np.float32)]
)
def test_loses_no_more_than_the_reference(op, B, heads, T, dtype: Any):
    log_beta, segment_ids, cotangent = make(T, B, heads, T, dtype)
    if T == 1500:  # ids in any order, which change within rows
        segment_ids = np.repeat(np.array([[9, 2, 2, 7, 2, -1]], np.int32), 250, axis=1)
    with jax.enable_x64(True):
        truth = value_and_grad(
            reference.retention_mass, log_beta.astype(np.float64), segment_ids, cotangent.astype(np.float64)
        )
    plain, got = (value_and_grad(o, log_beta, segment_ids, cotangent) for o in (reference.retention_mass, op))
    for p, g, t in zip(plain, got, truth, strict=True):
        assert g.dtype == p.dtype
        of_plain, of_op = (np.abs(x.astype(np.float64) - t).max() for x in (p, g))
        # Two orders of a float32 sum differ: by four steps of the largest.
        assert of_op <= 2 * of_plain + 4 * np.finfo(np.float32).eps * np.abs(t).max()


@everyone
@pytest.mark.parametrize("log_beta", [0.0, -math.inf])
def test_nothing_or_everything_is_forgotten(op, log_beta):
    gates = np.full((1, 2, 300), log_beta, np.float32)
    mass, grad = value_and_grad(op, gates, np.zeros((1, 300), np.int32), np.ones_like(gates))
    left = np.arange(299, -1, -1)  # later tokens; the sum of their ages is the gradient
    np.testing.assert_array_equal(mass[0, 0], np.arange(1, 301) if log_beta == 0 else np.ones(300))
    np.testing.assert_allclose(grad[0, 1], left * (left + 1) / 2 if log_beta == 0 else np.zeros(300), rtol=1e-6)


@every_kernel
def test_under_vmap_and_remat(op):
    log_beta, segment_ids, _ = make(4, B=2, heads=2, T=150, dtype=np.float32)
    layers = jnp.stack([jnp.asarray(log_beta), 2 * jnp.asarray(log_beta)])

    def grad(op, vmap, remat):
        mass = remat(lambda x: op(x, jnp.asarray(segment_ids)))
        return jax.jit(vmap(jax.grad(lambda x: (mass(x) ** 2).sum())))(layers)

    # The interpreter can do neither; the TPU kernels are lowered under both in `test_compile_tpu.py`.
    transforms = (lambda f: partial(jax.lax.map, f), lambda f: f) if op is TPU else (jax.vmap, jax.checkpoint)
    want, got = grad(reference.retention_mass, jax.vmap, jax.checkpoint), grad(op, *transforms)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))

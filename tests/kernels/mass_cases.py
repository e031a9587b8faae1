"""Inputs and gradients that the tests of every implementation of retention mass share."""

from typing import Any

import jax
import numpy as np
from seeds import generator


def make(seed, B, heads, T, dtype: Any = np.float64):
    """log_beta from never to at once, segment_ids of two and three documents a row, a cotangent."""
    rng = generator(seed)
    shape = B, heads, T
    log_beta = -np.exp(rng.normal(size=shape) * 2 - 2)
    log_beta = np.where(rng.random(shape) < 0.1, 0.0, np.where(rng.random(shape) < 0.1, -np.inf, log_beta))
    segment_ids = (np.arange(T)[None] * (2 + np.arange(B) % 2)[:, None] // T).astype(np.int32)
    return log_beta.astype(dtype), segment_ids, rng.normal(size=shape).astype(dtype)


def value_and_grad(op, log_beta, segment_ids, cotangent):
    """The mass and its gradient, in one compiled function, whose results repeat bitwise."""

    @jax.jit
    def run(log_beta, segment_ids, cotangent):
        mass, vjp = jax.vjp(lambda x: op(x, segment_ids), log_beta)
        return mass, vjp(cotangent)[0]

    results = run(log_beta, segment_ids, cotangent)
    for a, b in zip(results, run(log_beta, segment_ids, cotangent), strict=True):
        np.testing.assert_array_equal(a, b)
    return [np.asarray(x) for x in results]

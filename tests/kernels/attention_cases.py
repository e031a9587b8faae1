"""Inputs, gradients and the measure of error that the tests of every implementation of retention attention share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from seeds import generator

NAMES = ("q", "k", "v", "log_beta")


def make(seed, B, T, groups, dtype: Any = np.float64, K=2, H=4):
    """q, k, v, log_beta, segment_ids and a cotangent. Gates from never to at once, two and three documents a row."""
    rng = generator(seed)
    q, k, v = (rng.normal(size=(B, T, n, H)).astype(dtype) for n in (K * groups, K, K))
    log_beta = -np.exp(rng.normal(size=(B, K, T)) * 2 - 2)
    log_beta = np.where(rng.random((B, K, T)) < 0.1, 0.0, np.where(rng.random((B, K, T)) < 0.1, -np.inf, log_beta))
    segment_ids = (np.arange(T)[None] * (2 + np.arange(B) % 2)[:, None] // T).astype(np.int32)
    wide = np.float64 if dtype == np.float64 else np.float32
    return (q, k, v, log_beta.astype(wide), segment_ids), rng.normal(size=q.shape).astype(dtype)


def value_and_grads(op, inputs, cotangent):
    """The output and the gradients to every float input, in one compiled function, whose results repeat bitwise."""
    segment_ids = jnp.asarray(inputs[4])

    @jax.jit
    def run(q, k, v, log_beta, cotangent):
        out, vjp = jax.vjp(lambda *x: op(*x, segment_ids), q, k, v, log_beta)
        return out, vjp(cotangent)

    out, grads = run(*inputs[:4], cotangent)
    for a, b in zip(jax.tree.leaves((out, grads)), jax.tree.leaves(run(*inputs[:4], cotangent)), strict=True):
        np.testing.assert_array_equal(a, b)
    return np.asarray(out), [np.asarray(g) for g in grads]


def assert_close(got, want, tolerance):
    out, grads = got
    np.testing.assert_allclose(out, want[0], rtol=tolerance, atol=tolerance, err_msg="out")
    for name, g, w in zip(NAMES, grads, want[1], strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * max(1.0, np.abs(w).max()), err_msg=name)


def assert_as_good_as(plain, op, inputs, cotangent):
    """The largest error of `op` is at most twice that of `plain` in the same dtype, both against `plain` in float64."""
    wide = tuple(x.astype(np.float64) for x in inputs[:4])
    with jax.enable_x64(True):
        truth = jax.tree.leaves(value_and_grads(plain, (*wide, inputs[4]), cotangent.astype(np.float64)))
    runs = [jax.tree.leaves(value_and_grads(o, inputs, cotangent)) for o in (plain, op)]
    # Of a lone token the gradients of q and k are differences of these, and 0.
    differing = np.abs((cotangent * np.repeat(inputs[2], cotangent.shape[2] // inputs[2].shape[2], 2)).sum(3)).max()
    for name, t, by_plain, by_op in zip(("out", *NAMES), truth, *runs, strict=True):
        assert by_op.dtype == by_plain.dtype and np.isfinite(t).all()
        of_plain, of_op = (np.abs(x.astype(np.float64) - t).max() for x in (by_plain, by_op))
        # Sums are float32 whatever goes in, and two orders of a sum differ: by some steps of the largest. More of them
        # where the terms are differences, which keep the rounding of what cancels.
        step = np.finfo(np.float32).eps * (np.abs(t).max() or differing)
        allowed = 2 * of_plain + (4 if name in ("out", "v") else 16) * step
        assert of_op <= allowed, f"{name}: {of_op / step:.1f} steps, {allowed / step:.1f} are allowed"

"""Inputs that the tests of every implementation of attention over the buffer share, and the truth in float64."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from seeds import generator

from retention_jax.kernels import ops
from retention_jax.kernels.buffer_attention_xla import Window

B, K, R, SLOTS = 3, 3, 5, 150

KINDS = ("ragged", "empty heads", "one owns all", "empty")


def offsets(kind: str, rng: np.random.Generator) -> np.ndarray:
    """[B, K + 1] segments of one layer's heads, somewhere in the pool."""
    match kind:
        case "ragged":
            return np.sort(rng.integers(0, SLOTS + 1, (B, K + 1)), axis=1)
        case "empty heads":
            return np.array([[7, 7, 100, 100], [40, 40, 40, 41], [SLOTS - 3, SLOTS, SLOTS, SLOTS]])
        case "one owns all":
            return np.array([[0, SLOTS, SLOTS, SLOTS], [0, 0, SLOTS, SLOTS], [0, 0, 0, SLOTS]])
        case _:
            return np.array([[0, 0, 0, 0], [SLOTS] * 4, [9] * 4])


def make(
    seed: int, kind: str, T: int, groups: int, recent_len: tuple[int, ...], dtype: Any = np.float32, H: int = 8
) -> dict[str, np.ndarray]:
    """New tokens and what B rows hold. Rows of `recent_len` below 0 or above R hold none or all of the window."""
    rng = generator(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    return dict(
        q=3 * normal(B, T, K * groups, H),
        k=normal(B, T, K, H),
        v=normal(B, T, K, H),
        pool_k=normal(B, SLOTS, H),
        pool_v=normal(B, SLOTS, H),
        offset=offsets(kind, rng).astype(np.int32),
        recent_k=normal(B, K, R, H),
        recent_v=normal(B, K, R, H),
        recent_len=np.array(recent_len, np.int32),
    )


def with_window(x: dict[str, Any], seed: int, size: int) -> dict[str, Any]:
    """Positions for the keys of `make`: ascending in each head's segment, then the recent window's, then the new."""
    seen, pool_pos = np.array([60, 61, 200], np.int32), np.full((B, SLOTS), -1, np.int32)
    for b, (offset, before) in enumerate(zip(x["offset"], seen - np.maximum(x["recent_len"], 0), strict=True)):
        for begin, end in itertools.pairwise(offset):
            rng = np.random.default_rng([seed, b, begin])
            pool_pos[b, begin:end] = np.sort(rng.integers(0, before, end - begin))
    return x | dict(window=Window(*map(jnp.asarray, (np.int32(size), seen, pool_pos))))


def with_other_slots(x: dict[str, Any], value: float) -> dict[str, Any]:
    """`value` in all slots of pool and window that hold nothing of these heads."""
    other = {name: a.copy() for name, a in x.items()}
    for b in range(B):
        for name in ("k", "v"):
            other[f"pool_{name}"][b, : x["offset"][b, 0]] = other[f"pool_{name}"][b, x["offset"][b, -1] :] = value
            other[f"recent_{name}"][b, :, max(0, x["recent_len"][b]) :] = value
    return other


def dense(x: dict[str, Any], dtype: Any = np.float64) -> np.ndarray:
    """Every query by itself."""
    window = jax.tree.map(np.asarray, x["window"]) if "window" in x else None
    x = {name: a.astype(dtype) if a.dtype.kind != "i" else a for name, a in x.items() if name != "window"}
    q, out = x["q"], np.zeros(x["q"].shape, dtype)
    (T, N, H), recent_len = q.shape[1:], np.clip(x["recent_len"], 0, R)
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        h = n // (N // K)
        pool, recent = slice(x["offset"][b, h], x["offset"][b, h + 1]), slice(recent_len[b])
        keys = np.concatenate([x["pool_k"][b, pool], x["recent_k"][b, h, recent], x["k"][b, : t + 1, h]])
        values = np.concatenate([x["pool_v"][b, pool], x["recent_v"][b, h, recent], x["v"][b, : t + 1, h]])
        logits = keys @ q[b, t, n] * dtype(H**-0.5)
        if window is not None:
            newest, first = window.seen[b] + t, window.seen[b] - x["recent_len"][b]
            pos = [window.pool_pos[b, pool], first + np.arange(recent_len[b]), np.arange(window.seen[b], newest + 1)]
            logits[newest - np.concatenate(pos) >= window.size] = -np.inf
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ values / weights.sum()
    return out


@functools.partial(jax.jit, static_argnums=0)
def _attend(op, q, k, v, window=None, **held):
    itself = ops.causal_attention(q, k, v, None if window is None else window.size)
    return ops.merge([op(q, **held, window=window), itself]).out.astype(q.dtype)


def attend(op, x: dict[str, Any]) -> np.ndarray:
    """Attention over the buffer and the new tokens themselves, as the decoder merges it, which repeats bitwise."""
    x = jax.tree.map(jnp.asarray, x)
    out = np.asarray(_attend(op, **x))
    np.testing.assert_array_equal(out, np.asarray(_attend(op, **x)))
    return out

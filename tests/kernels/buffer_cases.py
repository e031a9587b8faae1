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

B, L, K, R, SLOTS = 3, 2, 3, 32, 300
LAYER = 1

KINDS = ("ragged", "empty heads", "one owns all", "empty")


def offsets(kind: str, rng: np.random.Generator) -> np.ndarray:
    """[B, K + 1] segments of one layer's heads, somewhere in the pool."""
    match kind:
        case "ragged":
            return np.sort(rng.integers(0, SLOTS + 1, (B, K + 1)), axis=1)
        case "empty heads":
            return np.array([[7, 7, 290, 290], [40, 40, 40, 41], [SLOTS - 3, SLOTS, SLOTS, SLOTS]])
        case "one owns all":
            return np.array([[0, SLOTS, SLOTS, SLOTS], [0, 0, SLOTS, SLOTS], [0, 0, 0, SLOTS]])
        case _:
            return np.array([[0, 0, 0, 0], [SLOTS] * 4, [9] * 4])


def make(
    seed: int,
    kind: str,
    T: int,
    groups: int,
    recent_end: tuple[int, ...],
    dtype: Any = np.float32,
    H: int = 8,
    *,
    recent_begin: tuple[int, ...] = (0,) * B,
) -> dict[str, Any]:
    """New tokens and what B rows hold."""
    rng = generator(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    return dict(
        q=3 * normal(B, T, K * groups, H),
        k=normal(B, T, K, H),
        v=normal(B, T, K, H),
        pool_k=normal(B, SLOTS, H),
        pool_v=normal(B, SLOTS, H),
        offset=offsets(kind, rng).astype(np.int32),
        recent_k=normal(B, L, K, R, H),
        recent_v=normal(B, L, K, R, H),
        recent_range=np.stack([recent_begin, recent_end], axis=1).astype(np.int32),
        layer=np.int32(LAYER),
    )


def with_window(x: dict[str, Any], seed: int, size: int) -> dict[str, Any]:
    """Positions for the keys of `make`: ascending in each head's segment, then the recent window's, then the new. In
    row b the window's last b tokens are another device's."""
    seen, pool_pos = np.array([60, 61, 200], np.int32), np.full((B, SLOTS), -1, np.int32)
    recent_pos = seen - x["recent_range"][:, 1] - np.arange(B, dtype=np.int32)
    for b, (offset, before) in enumerate(zip(x["offset"], recent_pos, strict=True)):
        for begin, end in itertools.pairwise(offset):
            rng = np.random.default_rng([seed, b, begin])
            pool_pos[b, begin:end] = np.sort(rng.integers(0, before, end - begin))
    return x | dict(window=Window(*map(jnp.asarray, (np.int32(size), seen, recent_pos, pool_pos))))


def with_other_slots(x: dict[str, Any], value: float) -> dict[str, Any]:
    """`value` in all slots of pool and windows that hold nothing of these heads."""
    other = {name: a.copy() for name, a in x.items()}
    for b in range(B):
        for name in ("k", "v"):
            other[f"pool_{name}"][b, : x["offset"][b, 0]] = other[f"pool_{name}"][b, x["offset"][b, -1] :] = value
            begin, end = x["recent_range"][b]
            recent = other[f"recent_{name}"][b]
            recent[LAYER, :, :begin] = recent[LAYER, :, end:] = recent[:LAYER] = value
    return other


def dense(x: dict[str, Any], dtype: Any = np.float64) -> np.ndarray:
    """Every query by itself."""
    window = jax.tree.map(np.asarray, x["window"]) if "window" in x else None
    x = {name: a.astype(dtype) if a.dtype.kind != "i" else a for name, a in x.items() if name != "window"}
    q, out = x["q"], np.zeros(x["q"].shape, dtype)
    T, N, H = q.shape[1:]
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        h = n // (N // K)
        pool, recent = slice(*x["offset"][b, h : h + 2]), (b, LAYER, h, slice(*x["recent_range"][b]))
        keys = np.concatenate([x["pool_k"][b, pool], x["recent_k"][recent], x["k"][b, : t + 1, h]])
        values = np.concatenate([x["pool_v"][b, pool], x["recent_v"][recent], x["v"][b, : t + 1, h]])
        logits = keys @ q[b, t, n] * dtype(H**-0.5)
        if window is not None:
            newest, of_window = window.seen[b] + t, window.recent_pos[b] + np.arange(*x["recent_range"][b])
            pos = np.concatenate([window.pool_pos[b, pool], of_window, np.arange(window.seen[b], newest + 1)])
            logits[newest - pos >= window.size] = -np.inf
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

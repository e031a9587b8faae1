"""Buffers that the tests of every implementation of eviction share; who survives, by a sort; how it is packed."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from seeds import generator


class Entries(NamedTuple):
    """The pool's slots, then `window` tokens of each head, as the operations of an eviction get them."""

    score: np.ndarray  # [B, E] float32
    pos: np.ndarray
    head: np.ndarray
    live: np.ndarray
    offset: np.ndarray  # [B, heads + 1]
    window: int


# What an order must tell apart, or must not.
HARD = np.array([np.inf, -np.inf, 0.0, -0.0, 1.2e-38, -1.2e-38, np.finfo(np.float32).max, 1.0, -1.0], np.float32)


def make(seed: int, sizes: list[list[int]], slots: int, window: int, scores: str) -> Entries:
    """`sizes[b][h]` live slots of each head; a token has one position in all heads; a third of the windows is dead.

    `scores`: "spread", "tied" (few values, among them the hard ones), "equal" or "by token" (ties across heads alone).
    """
    rng = generator(seed)
    B, heads = np.shape(sizes)
    offset = np.concatenate([np.zeros((B, 1), int), np.cumsum(sizes, axis=1)], axis=1)
    oldest = max(map(max, sizes)) + 3
    pos = np.full((B, slots + heads * window), -1)
    live = np.zeros(pos.shape, bool)
    for b in range(B):
        for h, size in enumerate(sizes[b]):
            pos[b, offset[b, h] : offset[b, h + 1]] = np.sort(rng.choice(oldest, size, replace=False))
    live[:, :slots] = np.arange(slots)[None] < offset[:, -1:]
    pos[:, slots:] = np.tile(oldest + np.arange(window), heads)[None]
    in_window = np.arange(window)[None] < window - rng.integers(0, window // 3 + 1, (B, 1))
    live[:, slots:] = np.tile(in_window, (1, heads))
    of_slot = lambda o: np.searchsorted(o[1:-1], np.arange(slots), side="right")
    head = np.concatenate([np.array([*map(of_slot, offset)]), np.tile(np.repeat(np.arange(heads), window), (B, 1))], 1)
    match scores:
        case "spread":
            score = -np.exp(3 * rng.normal(size=pos.shape))
        case "tied":
            score = rng.choice(HARD, pos.shape)
        case "equal":
            score = np.zeros(pos.shape)
        case _:
            score = -generator(seed).random((B, oldest + window + 1))[np.arange(B)[:, None], pos]
    int32 = lambda a: a.astype(np.int32)
    return Entries(score.astype(np.float32), int32(pos), int32(head), live, int32(offset), window)


def survivors(x: Entries, capacity: int, groups: int) -> np.ndarray:
    """[B, E] by a sort: score, then newer tokens, then lower heads."""
    keep = np.zeros_like(x.live)
    for b in range(len(x.live)):
        order = np.lexsort((x.head[b], -x.pos[b].astype(int), -x.score[b]))
        order = order[x.live[b, order]]
        for h in range(groups):
            best = order if groups == 1 else order[x.head[b, order] == h]
            keep[b, best[:capacity]] = True
    return keep


def packed(x: Entries, keep: np.ndarray, pool: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The next pool, zeros where it holds nothing, and its offsets: heads one after the other, old before new."""
    slots, heads = pool.shape[1], x.offset.shape[1] - 1
    result, offset = np.zeros_like(pool), np.zeros_like(x.offset)
    rows = np.concatenate([pool, window], axis=1)
    for b in range(len(pool)):
        at = 0
        for h in range(heads):
            of_head = np.r_[x.offset[b, h] : x.offset[b, h + 1], slots + h * x.window : slots + (h + 1) * x.window]
            kept = of_head[keep[b, of_head]]
            result[b, at : at + len(kept)] = rows[b, kept]
            at += len(kept)
            offset[b, h + 1] = at
    return result, offset


def any_bytes(seed: int, dtype: Any, *shape: int) -> np.ndarray:
    """Every pattern of bits: nan of all kinds, infinities, both zeros, subnormal numbers."""
    rng = generator(seed)
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def select(op, x: Entries, capacity: int, groups: int) -> np.ndarray:
    """`op`: an implementation of `evict_xla.select_top`."""
    shared = (x.offset.shape[1] - 1) * x.window
    args = map(jnp.asarray, (x.score, x.pos, x.head, x.live))
    return np.asarray(op(*args, capacity=capacity, groups=groups, shared=shared))


def pack(
    module: Any, x: Entries, keep: np.ndarray, pool: np.ndarray, window: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`module`: an implementation of `pack_order` and `pack_rows`, as `evict_xla` is."""
    order, offset = module.pack_order(*map(jnp.asarray, (keep, x.head, x.offset)), x.window)
    return np.asarray(module.pack_rows(jnp.asarray(pool), jnp.asarray(window), order)), np.asarray(offset)

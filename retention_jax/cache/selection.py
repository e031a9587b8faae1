"""Which entries an eviction leaves, by their scores, and which slot shard takes them in."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax import policies
from retention_jax.config import CacheConfig
from retention_jax.kernels import evict_xla, ops, slot_shards


def choose(
    cfg: CacheConfig,
    score: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    live: Bool[Array, "B E"],
    seen: Int[Array, " B"],
    heads: int,
    layers: int,
    *,
    shared: int,
) -> Bool[Array, "B E"]:
    """Which entries survive: protected ones, each head's reserve, then the best of the rest up to the budget.

    `shared` as in `ops.select_top`.
    """
    select_top = functools.partial(ops.select_top, shared=shared)
    protected = live & ((pos < cfg.protect_first) | (pos >= seen[:, None] - cfg.protect_last))
    score = jnp.where(protected, jnp.inf, score)
    if policies.reserve(cfg):
        reserved = select_top(score, pos, head, live, capacity=policies.reserve(cfg), groups=heads)
        score = jnp.where(reserved, jnp.inf, score)
    if cfg.threshold is not None:
        live = live & (score >= np.log(np.float32(cfg.threshold)))
    if cfg.policy == "pyramidkv":
        capacity = jnp.repeat(policies.pyramid(cfg, layers, seen), heads // layers, axis=1)
        return evict_xla.select_top(score, pos, head, live, capacity=capacity, groups=heads, shared=shared)
    match policies.scope(cfg):
        case "all":
            return select_top(score, pos, head, live, capacity=cfg.budget * heads, groups=1)
        case "head":
            return select_top(score, pos, head, live, capacity=cfg.budget, groups=heads)
        case "layer":  # the hardware's kernels know rows and heads only
            each = heads // layers
            together = functools.partial(evict_xla.select_top, groups=layers, heads_of_group=each, shared=shared)
            return together(score, pos, head, live, capacity=cfg.budget * each)


def deal(in_pool: Bool[Array, "B S"], in_window: Bool[Array, "B heads_window"]) -> Bool[Array, "B heads_window"]:
    """Which of the window's survivors this shard takes in.

    A shard has a fixed number of slots, and scores may favour the entries of a single shard; still none ever overflows,
    and no key or value ever moves from one to another. What survives in the pool stays where it is. Windows are whole
    on every shard, and so is the knowledge which of their entries survive, since all shards found one threshold. These
    are dealt out by free slots, one number that each shard tells the others: the shards with the most free slots take
    turns until they have as few as the next one, which then joins in. As survivors never outnumber the slots of all
    shards, there is a free slot for each. Shards that are equally full take the tokens of every head in turns.
    """
    if slot_shards.count() == 1:
        return in_window
    room = slot_shards.of_each(in_pool.shape[1] - in_pool.sum(axis=1, dtype=jnp.int32))
    order = jnp.argsort(room, axis=1, descending=True)  # stable
    falling = jnp.take_along_axis(room, order, axis=1)
    # How many are dealt before shard i of the order joins: until then, those before it came down to its free slots.
    joins = jnp.cumsum(falling, axis=1) - jnp.arange(1, room.shape[1] + 1, dtype=jnp.int32)[None] * falling
    number = jnp.maximum(jnp.cumsum(in_window, axis=1, dtype=jnp.int32) - 1, 0)
    players = (joins[:, None] <= number[:, :, None]).sum(axis=2, dtype=jnp.int32)
    turn = (number - jnp.take_along_axis(joins, players - 1, axis=1)) % players
    return in_window & (turn == jnp.argmax(order == slot_shards.index(), axis=1, keepdims=True).astype(jnp.int32))

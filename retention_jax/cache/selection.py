"""Which entries an eviction leaves, by their scores, and which slot shard takes them in."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax.config import CacheConfig
from retention_jax.kernels import ops, slot_shards


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

    def best(capacity: int | Int[Array, "B groups"], groups: int) -> Bool[Array, "B E"]:
        return ops.select_top(
            score, pos, head, live, capacity=capacity, groups=groups, heads_of_group=heads // groups, shared=shared
        )

    protected = live & ((pos < cfg.protect_first) | (pos >= seen[:, None] - cfg.protect_last))
    score = jnp.where(protected, jnp.inf, score)
    if reserve := max(cfg.min_per_head, cfg.row.reserve(cfg.budget)):
        score = jnp.where(best(reserve, heads), jnp.inf, score)
    if cfg.threshold is not None:
        live = live & (score >= np.log(np.float32(cfg.threshold)))
    if cfg.row.capacity is not None:
        by_layer = cfg.row.capacity(cfg.budget, cfg.newest, layers, seen)
        return best(jnp.repeat(by_layer, heads // layers, axis=1), heads)
    if cfg.local:
        return best(cfg.budget, heads)
    groups = {"all": 1, "layer": layers, "head": heads}[cfg.row.scope]
    return best(cfg.budget * (heads // groups), groups)


def deal(in_pool: Bool[Array, "B S"], in_recent: Bool[Array, "B heads_recent"]) -> Bool[Array, "B heads_recent"]:
    """Which of the recent tokens' survivors this shard takes in.

    A shard has a fixed number of slots, and scores may favour the entries of a single shard; still none ever overflows,
    and no key or value ever moves from one to another. What survives in the pool stays where it is. Recent tokens are
    whole on every shard, and every shard knows which of them survive, since all found one threshold. These survivors
    are dealt out by free slots, one number that each shard tells the others. The shards with the most free slots take
    turns until they have as few as the next one, which then joins in. Survivors never outnumber the slots of all
    shards, so there is a free slot for each. Shards that are equally full take the tokens of every head in turns.
    """
    if slot_shards.count() == 1:
        return in_recent
    room = slot_shards.of_each(in_pool.shape[1] - in_pool.sum(axis=1, dtype=jnp.int32))
    order = jnp.argsort(room, axis=1, descending=True)  # stable
    falling = jnp.take_along_axis(room, order, axis=1)
    # How many are dealt before shard i of the order joins: until then, those before it came down to its free slots.
    joins = jnp.cumsum(falling, axis=1) - jnp.arange(1, room.shape[1] + 1, dtype=jnp.int32)[None] * falling
    number = jnp.maximum(jnp.cumsum(in_recent, axis=1, dtype=jnp.int32) - 1, 0)
    players = (joins[:, None] <= number[:, :, None]).sum(axis=2, dtype=jnp.int32)
    turn = (number - jnp.take_along_axis(joins, players - 1, axis=1)) % players
    return in_recent & (turn == jnp.argmax(order == slot_shards.index(), axis=1, keepdims=True).astype(jnp.int32))

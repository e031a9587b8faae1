"""The table of eviction policies. A policy is one row; nothing outside this file compares their names.

To add a policy, write a score function and put a row into `POLICIES`. The configuration, the cache, the evaluation and
every command then know it by its name.
"""

import difflib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from retention_jax.kernels import ops
from retention_jax.policies import scores
from retention_jax.policies.scores import STREAMING_SINKS

DEFAULT = "retention"
FULL = "full"  # how commands and results call the cache that keeps everything, which is no policy
OF_FULL = "streaming"  # its policy: any keeps everything, and under this one the compiler drops the gates


class Options(NamedTuple):
    """What a configuration tells a policy; `CacheConfig` documents the fields."""

    budget: int
    horizon: int
    seed: int
    observe: int
    pool_width: int
    newest: int  # tokens that the policy keeps in every head because they are the newest


class Everything(NamedTuple):
    """The entries of all layers and heads side by side, as a policy of scope "all" sees them."""

    stat: Float[Array, "B E"]  # what each entry carries
    pos: Int[Array, "B E"]
    head: Int[Array, "B E"]  # layer * K + key/value head
    seen: Int[Array, " B"]  # tokens read so far
    outlook: Float[Array, "B L K all"] | None  # what each position is still worth, where the future is known


class OneLayer(NamedTuple):
    """The entries of one layer by head, pool and recent tokens together, as all other policies see them."""

    k: Float[Array, "B K E H"]
    v: Float[Array, "B K E H"]
    stat: Float[Array, "B K E"]
    pos: Int[Array, "B K E"]  # -1: dead
    seen: Int[Array, " B"]
    queries: Float[Array, "B Q N H"] | None  # since the last eviction, as many as the policy asks for
    query_pos: Int[Array, "B Q"] | None  # -1: none
    window: Int[Array, ""] | None  # tokens that the layer sees; None: all

    @property
    def live(self) -> Bool[Array, "B K E"]:
        return self.pos >= 0

    def newest(self, count: int) -> Bool[Array, "B K E"]:
        """Whether an entry is of one of the `count` newest tokens."""
        return self.pos >= (self.seen - count)[:, None, None]

    def attention(self, query_pos: Int[Array, "B Q"]) -> Float[Array, "B K G E"]:
        """The attention that each entry gets from the queries whose position is not -1, summed."""
        queries, _ = self.asked()
        return ops.attention_received(queries, query_pos, self.k, self.pos, self.window)

    def mean_attention(self, count: int) -> Float[Array, "B K G E"]:
        """The mean attention that each entry gets from the `count` newest queries."""
        _, query_pos = self.asked()
        chosen = jnp.where(query_pos >= (self.seen - count)[:, None], query_pos, -1)
        total = self.attention(chosen)
        return total / jnp.maximum((chosen >= 0).sum(axis=1), 1).astype(total.dtype)[:, None, None, None]

    def asked(self) -> tuple[Float[Array, "B Q N H"], Int[Array, "B Q"]]:
        """The queries and their positions.

        Raises:
          ValueError: where the policy's row asks for none.
        """
        if self.queries is None or self.query_pos is None:
            raise ValueError("this score needs queries: its row in the policy table must say how many")
        return self.queries, self.query_pos


# A score function returns the score of every entry, and what the entries carry from now on.
Scored = tuple[Float[Array, "*axes"], Float[Array, "*axes"]]


def _log_beta(log_beta: Float[Array, "*axes"], prompt: bool) -> Float[Array, "*axes"]:
    return log_beta


def _nothing(log_beta: Float[Array, "*axes"], prompt: bool) -> Float[Array, "*axes"]:
    return jnp.zeros_like(log_beta)


def _whether_prompt(log_beta: Float[Array, "*axes"], prompt: bool) -> Float[Array, "*axes"]:
    return jnp.full_like(log_beta, float(prompt))


class Policy(NamedTuple):
    """One row: a score function and what it needs. The defaults are those of a policy that needs nothing."""

    name: str
    score: Callable[..., Scored]  # of (Options, Everything) where scope is "all", else of (Options, OneLayer)
    # What competes for one budget: everything, the heads of a layer, or the entries of a head alone. Policies of scope
    # "all" rank single entries, and so also run with `local=True`, a budget for each head.
    scope: Literal["all", "layer", "head"]
    options: tuple[str, ...] = ()  # fields of CacheConfig that only some policies honour, and this one does
    carry: Callable[[Float[Array, "*axes"], bool], Float[Array, "*axes"]] = (
        _nothing  # by a new entry: (log_beta, prompt)
    )
    queries: Callable[[int, int], int] = lambda observe, tokens: 0  # how many of the newest queries of `tokens` it sees
    newest: Callable[[int, int], int] = lambda budget, observe: 0  # newest tokens that stay in every head
    reserve: Callable[[int], int] = lambda budget: 0  # best entries that every head keeps before heads compete
    # Entries of each head, [B, L], by (budget, newest, layers, seen), where layers differ; None: the budget.
    capacity: Callable[[int, int, int, Int[Array, " B"]], Int[Array, "B L"]] | None = None
    most_in_a_head: Callable[[int, int], int] = lambda budget, kv_heads: budget  # scope "layer" or "head": largest head
    least_in_a_head: Callable[[int, int], int] = lambda budget, newest: budget  # what must hold all protected tokens
    uses_gates: bool = False  # without trained gates it says nothing
    needs_future: bool = False  # must be told what comes: runs only where whole sequences are scored
    needs_prompt: bool = False  # tells a prompt from what follows it
    seeded: bool = False  # draws random numbers


def _retention(options: Options, x: Everything) -> Scored:
    return scores.retention(x.stat, x.pos, x.seen, options.horizon), x.stat


def _streaming(options: Options, x: Everything) -> Scored:
    return scores.streaming(x.pos), x.stat


def _random(options: Options, x: Everything) -> Scored:
    return scores.random(x.pos, x.head, options.seed), x.stat


def _random_keep_prompt(options: Options, x: Everything) -> Scored:
    """Prompt tokens carry 1, more than any draw (arXiv 2609.03430, which draws for each head by itself: local=True)."""
    return x.stat + scores.random(x.pos, x.head, options.seed), x.stat


def _oracle(options: Options, x: Everything) -> Scored:
    """The attention that an entry will get from all later queries in a full cache."""
    if x.outlook is None:
        raise ValueError("a policy that needs to know the future was told nothing of it")
    size = x.outlook.shape[-1]
    place = x.head * size + jnp.clip(x.pos, 0, size - 1)
    return jnp.take_along_axis(x.outlook.reshape(x.pos.shape[0], -1), place, axis=1), x.stat


def _key_norm(options: Options, x: OneLayer) -> Scored:
    return scores.key_norm(x.k), x.stat


def _key_diff(options: Options, x: OneLayer) -> Scored:
    return scores.key_diff(x.k, x.live), x.stat


def _tova(options: Options, x: OneLayer) -> Scored:
    return scores.tova(x.mean_attention(1)), x.stat


def _h2o(options: Options, x: OneLayer) -> Scored:
    """All attention received so far, summed over the group; the newest tokens stay (arXiv 2306.14048)."""
    _, query_pos = x.asked()
    stat = x.stat + x.attention(query_pos).sum(axis=2).astype(jnp.float32)
    return _keeping(x.newest(options.newest), stat), stat


def _snapkv(options: Options, x: OneLayer) -> Scored:
    """Votes of the newest queries; the newest tokens stay. PyramidKV and AdaKV score alike and share out otherwise."""
    newest = x.newest(options.newest)
    votes = scores.observed(x.mean_attention(options.observe), x.live & ~newest, options.pool_width)
    return _keeping(newest, votes), x.stat


def _rkv(options: Options, x: OneLayer) -> Scored:
    newest = x.newest(options.newest)
    votes = scores.pooled(x.mean_attention(options.observe).max(axis=2), x.live & ~newest, options.pool_width)
    alike = ops.redundancy(x.k, x.live, scores.RKV_SIMILAR)
    return _keeping(newest, scores.rkv(votes, alike, x.live)), x.stat


def _expected_attention(options: Options, x: OneLayer) -> Scored:
    """Queries of the first tokens are unlike all others and are left out; those tokens' own entries stay."""
    queries, query_pos = x.asked()
    usual = jnp.where(query_pos >= STREAMING_SINKS, query_pos, -1)
    score = scores.expected_attention(ops.expected_weight(queries, usual, x.k, x.live), x.v)
    return _keeping(x.pos < STREAMING_SINKS, score), x.stat


def _keeping(stays: Bool[Array, "B K E"], score: Float[Array, "B K E"]) -> Float[Array, "B K E"]:
    return jnp.where(stays, jnp.finfo(jnp.float32).max, score)


def _observed(observe: int, tokens: int) -> int:
    return min(observe, tokens)


def _all_queries(observe: int, tokens: int) -> int:
    return tokens


def _observed_stay(budget: int, observe: int) -> int:
    return min(observe, budget // 2)


_OBSERVING = ("observe", "pool_width")
_ROWS = (
    Policy("retention", _retention, "all", ("horizon", "threshold"), carry=_log_beta, uses_gates=True),
    Policy("streaming", _streaming, "all"),
    Policy("random", _random, "all", seeded=True),
    Policy("random_keep_prompt", _random_keep_prompt, "all", carry=_whether_prompt, needs_prompt=True, seeded=True),
    Policy("key_norm", _key_norm, "head"),
    Policy("key_diff", _key_diff, "head"),
    Policy("tova", _tova, "head", queries=lambda observe, tokens: 1),
    Policy("h2o", _h2o, "head", queries=_all_queries, newest=lambda budget, observe: budget // 2),
    Policy("snapkv", _snapkv, "head", _OBSERVING, queries=_observed, newest=_observed_stay),
    Policy(
        "pyramidkv",
        _snapkv,
        "head",
        _OBSERVING,
        queries=_observed,
        newest=_observed_stay,
        capacity=scores.pyramid,
        most_in_a_head=lambda budget, kv_heads: 2 * budget,
        least_in_a_head=lambda budget, newest: newest + (budget - newest) // scores.PYRAMID,
    ),
    # AdaKV's safeguard is 0.2 (arXiv 2407.11550). As in kvpress, a head's safe fifth is taken first and the rest goes
    # to the best. Its authors' code adds a fifth of the budget to four fifths of what the head would win without it.
    Policy(
        "adakv",
        _snapkv,
        "layer",
        _OBSERVING,
        queries=_observed,
        newest=_observed_stay,
        reserve=lambda budget: budget // 5,
        most_in_a_head=lambda budget, kv_heads: budget * kv_heads,
    ),
    Policy("rkv", _rkv, "head", _OBSERVING, queries=_observed, newest=_observed_stay),
    Policy("expected_attention", _expected_attention, "head", queries=_all_queries),
    Policy("oracle", _oracle, "all", needs_future=True),
)
POLICIES = {row.name: row for row in _ROWS}


def special_options() -> tuple[str, ...]:
    """Fields of CacheConfig that only some policies honour; the others refuse them rather than ignore them."""
    return tuple(dict.fromkeys(option for row in POLICIES.values() for option in row.options))


def unknown(name: str) -> str:
    """What to say of a name that is in no row: the nearest one, and all of them."""
    near = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.0)[0]
    return f"policy must be one of {', '.join(POLICIES)}; got {name!r}, the nearest is {near!r}"

"""The next token of each row: greedy, or drawn from a tempered distribution that top-k, then top-p, then min-p cut.

Every setting is an array over rows. So another value does not compile anew, and rows with different settings share one
batch: a row's token depends on its own logits and settings only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from retention_jax.runtime.arrays import AnyArray

Numbers: TypeAlias = int | float | Sequence[int | float] | AnyArray  # one for all rows, or one for each
NOT_FINITE = -1  # the token of a row without a finite largest logit


class Sampling(NamedTuple):
    """How each row's tokens are chosen. Neutral values switch a filter off."""

    temperature: Float[Array, " B"]  # divides the logits; 0: the likeliest token, nothing is drawn
    top_k: Int[Array, " B"]  # keep the k likeliest tokens, and ties with the last of them; 0 keeps all
    top_p: Float[Array, " B"]  # keep the fewest likeliest tokens whose probabilities sum to this (arXiv 1904.09751)
    min_p: Float[Array, " B"]  # keep tokens with at least this share of the likeliest one's (arXiv 2407.01082)
    key: Key[Array, " B"]  # of the row's seed and its id


# Of every setting: what it must be, and the test.
_INT32 = np.iinfo(np.int32)
_real = lambda x: isinstance(x, int | float | np.integer | np.floating)
_whole = lambda x, least, most: isinstance(x, int | np.integer) and least <= x <= most
_REQUIRED = {
    "temperature": ("at least 0", lambda x: _real(x) and x >= 0),
    "top_k": (f"a whole number from 0 (keeps all tokens) to {_INT32.max}", lambda x: _whole(x, 0, _INT32.max)),
    "top_p": ("in (0, 1]", lambda x: _real(x) and 0 < x <= 1),
    "min_p": ("in [0, 1]", lambda x: _real(x) and 0 <= x <= 1),
    "seed": ("a whole number of 64 bits", lambda x: _whole(x, -(2**63), 2**63 - 1)),
    "row_ids": ("whole numbers of 32 bits", lambda x: _whole(x, _INT32.min, _INT32.max)),
    "max_new_tokens": ("at least 1", lambda x: _whole(x, 1, _INT32.max)),
}


def over_rows(rows: int, **settings: Numbers) -> tuple[dict[str, list[Any]], list[str]]:
    """One value a row of each setting, and what is wrong with them: each bad value, named with its row.

    Args:
      rows: how many rows there are.
      settings: of `Sampling`, `seed`, `row_ids` and `max_new_tokens`. A single number holds for all rows.
    """
    found, problems = {}, []
    for name, given in settings.items():
        values = given.tolist() if isinstance(given, jax.Array | np.ndarray | np.generic) else given
        single = not isinstance(values, Sequence)
        found[name] = [values] * rows if single else list(values)
        if len(found[name]) != rows:
            problems.append(f"{name} must be {rows} numbers, got {len(found[name])}")
        needed, holds = _REQUIRED[name]
        for row, value in enumerate([values] if single else values):
            if not holds(value):
                problems.append(f"{name} must be {needed}, got {value}" + ("" if single else f" for row {row}"))
    return found, problems


def settings(
    temperature: Numbers = 0.0,
    top_k: Numbers = 0,
    top_p: Numbers = 1.0,
    min_p: Numbers = 0.0,
    *,
    seed: Numbers = 0,
    row_ids: Sequence[int] = (0,),
) -> Sampling:
    """Checked settings. All but `row_ids` may be one number for all rows.

    Args:
      temperature, top_k, top_p, min_p: see `Sampling`.
      seed: of the draws.
      row_ids: a number for each row. Rows of the same seed and id draw the same tokens from the same logits.

    Raises:
      ValueError: naming every value that is out of its range, with its row.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    values, problems = over_rows(len(row_ids), **given, row_ids=row_ids)
    if problems:
        raise ValueError("; ".join(problems))
    floats = {name: jnp.asarray(values[name], jnp.float32) for name in ("temperature", "top_p", "min_p")}
    # `jax.random.key` of a number that 32 bits do not hold takes its lowest 32.
    seeds = np.asarray(values["seed"], np.int64).astype(np.int32)
    keys = row_keys(jnp.asarray(seeds), jnp.asarray(values["row_ids"], jnp.int32))
    return Sampling(top_k=jnp.asarray(values["top_k"], jnp.int32), key=keys, **floats)


@jax.jit
def row_keys(seed: Int[Array, " B"], row_id: Int[Array, " B"]) -> Key[Array, " B"]:
    """What each row's draws depend on."""
    return jax.vmap(lambda seed, row_id: jax.random.fold_in(jax.random.key(seed), row_id))(seed, row_id)


def keep(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered logits, with -inf for the tokens that top-k, top-p and min-p leave out. The likeliest token stays.

    Of equally likely tokens at the edge of top-p all stay.
    """
    logits = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    everything = lambda logits, _: jnp.full_like(logits[:, :1], -jnp.inf)
    cut = _draws(sampling) & ((sampling.top_k > 0) | (sampling.top_p < 1))  # else there is nothing to sort for
    least = jax.lax.cond(jnp.any(cut), _least_of_top, everything, logits, sampling)
    # min_p times the largest probability, as logarithms: the normaliser cancels.
    least = jnp.maximum(least, jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None])
    return jnp.where(logits >= least, logits, -jnp.inf)


def _draws(sampling: Sampling) -> Bool[Array, " B"]:
    return sampling.temperature > 0


def _least_of_top(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B 1"]:
    """The lowest logit that top-k and then top-p keep."""
    V = logits.shape[-1]
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, V), V) - 1
    of_k = jnp.take_along_axis(ordered, last, axis=-1)
    probs = jax.nn.softmax(jnp.where(ordered >= of_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of all likelier tokens
    # Without top-p the sum may still round up to 1; there top-k alone decides.
    kept = jnp.where(top_p < 1, jnp.sum(before < top_p, axis=-1, keepdims=True), V)
    of_p = jnp.take_along_axis(ordered, jnp.clip(kept, 1, V) - 1, axis=-1)
    return jnp.maximum(of_k, of_p)


def sample(logits: Float[Array, "B V"], step: Int[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """One token a row; `NOT_FINITE` for a row whose largest logit is NaN or infinite.

    `step` is how many tokens each row has so far: its draw depends on it and on the row's key. Where no row draws,
    nothing is sorted or drawn.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: Float[Array, "B V"], greedy: Int[Array, " B"]) -> Int[Array, " B"]:
        keys = jax.vmap(jax.random.fold_in)(sampling.key, step)
        drawn = jax.vmap(jax.random.categorical)(keys, keep(logits, sampling)).astype(jnp.int32)
        return jnp.where(_draws(sampling), drawn, greedy)

    token = jax.lax.cond(jnp.any(_draws(sampling)), draw, lambda _, greedy: greedy, logits, greedy)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), token, NOT_FINITE)


class LogProbs(NamedTuple):
    """Natural logarithms of probabilities under the model's own distribution: no temperature, nothing cut."""

    chosen: Float[Array, "*axes"]  # of the tokens that came next
    tokens: Int[Array, "*axes likeliest"]  # the likeliest ones, likeliest first
    likeliest: Float[Array, "*axes likeliest"]  # theirs


MOST_LIKELIEST = 20


def log_probs(logits: Float[Array, "n V"], token: Int[Array, " n"]) -> LogProbs:
    """Of each row's `token`, and of its `MOST_LIKELIEST` likeliest ones."""
    every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(every, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    likeliest, tokens = jax.lax.top_k(every, min(MOST_LIKELIEST, every.shape[-1]))
    return LogProbs(chosen, tokens, likeliest)


def no_log_probs(axes: tuple[int, ...], vocabulary: int) -> LogProbs:
    """Zeros, in the shapes of `log_probs` of a vocabulary of so many tokens."""
    likeliest = (*axes, min(MOST_LIKELIEST, vocabulary))
    return LogProbs(jnp.zeros(axes, jnp.float32), jnp.zeros(likeliest, jnp.int32), jnp.zeros(likeliest, jnp.float32))

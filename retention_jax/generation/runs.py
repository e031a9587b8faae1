"""Generation: prompts are read, then tokens are made in compiled runs, each of many tokens a row and their evictions.

A run takes a `DecodeState` and hands the next one back. Nothing goes to the host within it. How each row's tokens are
chosen (`Sampling`) and when the row ends (`Limits`) are arrays over rows, so one program serves rows of all kinds.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax.cache import full_nbytes
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.generation import decoding, sampling
from retention_jax.generation.sampling import LogProbs, Numbers, Sampling
from retention_jax.models import inputs
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Row
from retention_jax.parallel import sharding

# Tokens a row of one compiled run, whatever the cache: between two calls of `on_tokens`, and without it.
_STREAMED, _AT_ONCE = 8, 128
_NO_TOKEN = -1  # fills up rows with fewer stop tokens
StopTokens: TypeAlias = Sequence[int] | Sequence[Sequence[int]]  # one list for all rows, or a list for each


class DecodeState(NamedTuple):
    """Where each row stands between two tokens."""

    newest: Int[Array, " B"]  # its last token, which is not yet in the buffer
    done: Bool[Array, " B"]  # whether it has ended; such a row takes nothing in
    step: Int[Array, " B"]  # its new tokens so far
    buffer: Buffer


class Limits(NamedTuple):
    """When each row ends."""

    max_new_tokens: Int[Array, " B"]
    stop_tokens: Int[Array, "B stops"]  # any of them is the row's last token; -1 is none


class Output(NamedTuple):
    """What `generate` returns."""

    tokens: list[list[int]]  # new tokens of each prompt, up to and including its stop token
    # prompt_tokens, new_tokens, prefill_seconds, decode_seconds, tokens_per_second (decoding), live (entries),
    # full_live, kv_bytes, full_kv_bytes; what is full is what a full cache would hold
    stats: dict[str, float]
    buffer: Buffer  # holds every token but each row's last


@decoding.on_its_mesh
def generate(
    model: Decoder,
    prompts: Sequence[Row],
    cache: CacheConfig,
    *,
    max_new_tokens: Numbers,
    temperature: Numbers = 0.0,
    seed: Numbers = 0,
    top_k: Numbers = 0,
    top_p: Numbers = 1.0,
    min_p: Numbers = 0.0,
    stop_tokens: StopTokens = (),
    row_ids: Sequence[int] | None = None,
    buffer: Buffer | None = None,
    on_tokens: Callable[[list[list[int]]], object] | None = None,
) -> Output:
    """Continues each prompt under the budget, in compiled runs of tokens.

    A prompt's new tokens depend on this prompt, its settings, its seed and its row id, and on no other prompt.
    All settings are one number for all prompts, or a number for each.

    Args:
      model: the decoder.
      prompts: token ids, or prompts with pictures.
      cache: what to keep.
      max_new_tokens: at most so many tokens for a prompt.
      temperature: divides the logits before a token is drawn. At 0 the likeliest token is taken.
      seed: of the draws.
      top_k, top_p, min_p: cut the distribution, see `sampling.Sampling`.
      stop_tokens: the tokens that end a prompt's continuation: one list for all prompts, or a list for each.
      row_ids: a number for each prompt, which its draws depend on; by default its index. A prompt with an id of its
        own gets the same samples in every batch.
      buffer: an earlier turn's buffer, which the prompts continue. It is donated. It lacks that turn's last tokens, so
        the prompts must begin with them.
      on_tokens: called with every row's new tokens as they come, a few at a time. A true answer ends generation.

    Raises:
      ValueError: on no or empty prompts, on token ids outside the vocabulary, on settings out of their range (all
        listed, with their rows), on logits that are not finite (with prompt and token), and as `prefill` does.
    """
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    draws = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    limits = _checked(model, prompts, stop_tokens, max_new_tokens=max_new_tokens, row_ids=row_ids, **draws)
    how = sampling.settings(**draws, row_ids=row_ids)
    lengths = inputs.lengths(prompts)
    started = time.perf_counter()
    whole = inputs.of_rows(prompts, decoding.bucket(max(lengths), cache.prefill_chunk), model.vision)
    logits, held = jax.block_until_ready(decoding.read_prompts(model, whole, cache, buffer))
    prefilled = time.perf_counter()
    new, run = [[] for _ in prompts], _STREAMED if on_tokens else _AT_ONCE
    newest, done, step = first_tokens(logits, how, limits)
    state = DecodeState(newest, done, step, held)
    fresh, count = state.newest[:, None], state.step
    while True:
        pieces = [row[:n].tolist() for row, n in zip(*map(sharding.on_host, (fresh, count)), strict=True)]
        for row, piece in zip(new, pieces, strict=True):
            row += piece
        _check_finite(new)
        if (on_tokens and on_tokens(pieces)) or sharding.on_host(state.done).all():
            break
        state, fresh, count, _ = decode_run(model, state, how, limits, run)
    stats = _stats(model, lengths, new, state.buffer, prefilled - started, time.perf_counter() - prefilled)
    return Output(new, stats, state.buffer)


def _checked(model: Decoder, prompts: Sequence[Row], stop_tokens: StopTokens, **settings: Numbers) -> Limits:
    """The limits of each row, once prompts, stop tokens and all settings are found right."""
    V, rows = model.config.vocab_size, len(prompts)
    ids = [inputs.ids_of(p) for p in prompts]
    problems = [f"prompt {i} is empty" for i, p in enumerate(ids) if not len(p)]
    problems += [
        f"prompt {i} has token {bad[0]}, outside [0, {V})"
        for i, p in enumerate(ids)
        if (bad := [t for t in p if not 0 <= t < V])
    ]
    problems += ["there must be at least one prompt"] * (not prompts)
    values, found = sampling.over_rows(rows, **settings)
    stops, also = _stops_of_rows(stop_tokens, rows)
    if problems := [*problems, *found, *also]:
        raise ValueError("; ".join(problems))
    width = max(map(len, stops))
    filled = [[*row, *[_NO_TOKEN] * (width - len(row))] for row in stops]
    return Limits(jnp.asarray(values["max_new_tokens"], jnp.int32), jnp.asarray(np.array(filled, np.int32)))


def _stops_of_rows(stop_tokens: StopTokens, rows: int) -> tuple[list[list[int]], list[str]]:
    """The stop tokens of each row, and what is wrong with them."""
    given: list[Any] = list(stop_tokens)
    nested = [np.ndim(stop) > 0 for stop in given]
    if any(nested) and not all(nested):
        return [], ["stop_tokens must be token ids, or a list of them for each prompt, and not both"]
    each = [list(row) for row in given] if any(nested) else [given] * rows
    problems = [f"stop_tokens must be {rows} lists, got {len(each)}"] * (len(each) != rows)
    bad = sorted({int(t) for row in each for t in row if not 0 <= t < 2**31})
    problems += [f"stop_tokens must be in [0, 2**31), got {', '.join(map(str, bad))}"] * bool(bad)
    return each, problems


def _check_finite(new: list[list[int]]) -> None:
    """Raises ValueError where the newest token of a prompt stands for logits that are not finite."""
    bad = [f"prompt {i} at new token {len(row) - 1}" for i, row in enumerate(new) if row[-1] == sampling.NOT_FINITE]
    if bad:
        raise ValueError(
            f"logits are not finite for {', '.join(bad)}: the weights hold NaN or infinity, or their dtype overflows"
        )


def _stats(
    model: Decoder, lengths: list[int], new: list[list[int]], buffer: Buffer, prefill_seconds: float, seconds: float
) -> dict[str, float]:
    cfg, count, seen = model.config, sum(map(len, new)), int(sharding.on_host(buffer.seen).sum())
    return {
        "prompt_tokens": float(sum(lengths)),
        "new_tokens": float(count),
        "prefill_seconds": prefill_seconds,
        "decode_seconds": seconds,
        "tokens_per_second": count / seconds,
        "live": float(sharding.on_host(buffer.live).sum()),
        "full_live": float(seen * cfg.num_layers * cfg.num_kv_heads),
        "kv_bytes": float(buffer.nbytes),
        "full_kv_bytes": float(full_nbytes(cfg, seen)),
    }


@jax.jit
def first_tokens(
    logits: Float[Array, "B V"], how: Sampling, limits: Limits
) -> tuple[Int[Array, " B"], Bool[Array, " B"], Int[Array, " B"]]:
    """All of a `DecodeState` but its buffer: each row's token that follows its prompt."""
    token = sampling.sample(logits, jnp.zeros(logits.shape[:1], jnp.int32), how)
    return token, _ends(token, jnp.ones_like(token), limits), jnp.ones_like(token)


def _ends(token: Int[Array, " B"], step: Int[Array, " B"], limits: Limits) -> Bool[Array, " B"]:
    """Whether a row's token, by which it has `step` of them, is its last."""
    stops = jnp.any(token[:, None] == limits.stop_tokens, axis=1)
    return stops | (token == sampling.NOT_FINITE) | (step >= limits.max_new_tokens)


class _Run(NamedTuple):
    """What the loops of a run carry."""

    state: DecodeState
    turn: Int[Array, ""]  # tokens of a row that has not ended in this run
    tokens: Int[Array, "B run"]
    log_probs: LogProbs | None  # [B, run]; None: not asked for


@functools.partial(jax.jit, static_argnames=("run", "row_by_row"), donate_argnames="state")
def decode_run(
    model: Decoder,
    state: DecodeState,
    how: Sampling,
    limits: Limits,
    run: int,
    *,
    wanted: Bool[Array, " B"] | None = None,
    row_by_row: bool = False,
) -> tuple[DecodeState, Int[Array, "B run"], Int[Array, " B"], LogProbs]:
    """Makes up to `run` tokens a row. Between two evictions the pool is only read, so it is never copied.

    Args:
      model: the decoder.
      state: where each row stands. It is donated: go on with the returned one.
      how: how each row's tokens are chosen.
      limits: when each row ends.
      run: at most so many tokens a row. Less once all rows have ended.
      wanted: rows whose tokens' log-probabilities are asked for; without it the program cannot tell any.
      row_by_row: as in `decoding.evict_if_full`.

    Returns:
      The state afterwards, each row's new tokens, how many of them are real, and their log-probabilities, [B, run]:
      zeros in steps where no row wants them, and of no tokens, [B, 0], without `wanted`.
    """
    start, rows = state.step, state.newest.shape[0]
    none = lambda *run: sampling.no_log_probs((rows, *run), model.config.vocab_size)

    def one_token(s: _Run) -> _Run:
        active = ~s.state.done
        logits, buffer = decoding.decode_step(model, s.state.newest, active, s.state.buffer)
        token = sampling.sample(logits, s.state.step, how)
        step = s.state.step + active
        newest = jnp.where(active, token, s.state.newest)
        state = DecodeState(newest, s.state.done | _ends(token, step, limits), step, buffer)
        put = lambda all_turns, one: jax.lax.dynamic_update_index_in_dim(all_turns, one, s.turn, axis=1)
        log_probs = s.log_probs
        if wanted is not None:
            found = jax.lax.cond(jnp.any(wanted & active), sampling.log_probs, lambda *_: none(), logits, token)
            log_probs = jax.tree.map(put, log_probs, found)
        return _Run(state, s.turn + 1, put(s.tokens, token), log_probs)

    def goes_on(s: _Run) -> Bool[Array, ""]:
        return ~jnp.all(s.state.done) & (s.turn < run)

    def until_eviction(s: _Run) -> _Run:
        with jax.named_scope("tokens"):
            s = jax.lax.while_loop(lambda s: goes_on(s) & ~decoding.is_full(s.state.buffer), one_token, s)
        held = decoding.evict_if_full(s.state.buffer, row_by_row=row_by_row)
        return s._replace(state=s.state._replace(buffer=held))

    told = None if wanted is None else none(run)
    first = _Run(state, jnp.int32(0), jnp.zeros((rows, run), jnp.int32), told)
    with jax.named_scope("run"):
        end = jax.lax.while_loop(goes_on, until_eviction, first)
    return end.state, end.tokens, end.state.step - start, none(0) if end.log_probs is None else end.log_probs


def lower_run(model: Decoder, buffer: Buffer, run: int) -> jax.stages.Lowered:
    """`decode_run` lowered from shapes, on the mesh that was entered; with one stop token a row.

    Its loops stand in named scopes: `run`, of a turn for each eviction, and in it `tokens` and `evict`, of one or none.
    """
    B = buffer.seen.shape[0]
    make = lambda: (sampling.settings(row_ids=range(B)), Limits(jnp.zeros(B, jnp.int32), jnp.zeros((B, 1), jnp.int32)))
    placed = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=buffer.seen.sharding)
    how, limits = jax.tree.map(placed, jax.eval_shape(make))
    number = placed(buffer.seen)
    done = placed(jax.ShapeDtypeStruct((B,), jnp.bool_))
    state = DecodeState(number, done, number, buffer)  # pyright: ignore[reportArgumentType]
    return decode_run.lower(model, state, how, limits, run=run)

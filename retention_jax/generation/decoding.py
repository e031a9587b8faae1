"""From tokens to an evicted cache: prefill, decode, generation.

Everything here is: extend the model by some tokens, then let the cache take the new entries in.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax import cache as cache_room
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.generation import sampling
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs, chunk_of, padded
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray

P = ParamSpec("P")
R = TypeVar("R")


def _on_its_mesh(function: Callable[Concatenate[Decoder, P], R]) -> Callable[Concatenate[Decoder, P], R]:
    """Runs a function of a model on the mesh that the model's weights are laid out on."""

    @functools.wraps(function)
    def run(model: Decoder, *args: P.args, **kwargs: P.kwargs) -> R:
        with sharding.enter_mesh_of(model):
            return function(model, *args, **kwargs)

    return run


def read_chunk(
    model: Decoder,
    inputs: Inputs,
    buffer: Buffer,
    *,
    prompt: bool,
    length: Int[Array, " B"] | None = None,
    outlook: Float[Array, "B L K all"] | None = None,
) -> tuple[Float[Array, "B C D"], Buffer]:
    """Attends to buffer and chunk, runs all layers, merges the chunk into the pool. Returns final hidden states.

    Args:
      model: the decoder.
      inputs: the chunk, [B, C].
      buffer: what is remembered so far.
      prompt: whether the chunk is part of a prompt, which some policies keep.
      length: tokens of each row once its whole prompt is read, as in `decoder.extend`.
      outlook: as in `cache.take_in`.
    """
    wanted = cache_room.queries_wanted(buffer.config, inputs.tokens.shape[1])
    read, valid = decoder.extend(model, inputs, buffer, queries=wanted, length=length), jnp.asarray(inputs.valid)
    return read.hidden, cache_room.take_in(buffer, read.entries, valid, read.queries, outlook, prompt=prompt)


def decode_step(
    model: Decoder, tokens: Int[Array, " B"], active: Bool[Array, " B"], buffer: Buffer
) -> tuple[Float[Array, "B V"], Buffer]:
    """Reads one token a row into the recent window, without evicting. An inactive row takes nothing in."""
    inputs, wanted = Inputs(tokens[:, None], active[:, None]), cache_room.queries_wanted(buffer.config, 1)
    read = decoder.extend(model, inputs, buffer, queries=wanted)
    return decoder.unembed(model, read.hidden[:, 0]), cache_room.append(buffer, read.entries, active, read.queries)


@functools.partial(jax.jit, donate_argnames=("buffer", "last"))
def _prefill_chunk(
    model: Decoder, inputs: Inputs, buffer: Buffer, last: Float[Array, "B D"], length: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Buffer]:
    """Reads a chunk of prompts. `last` is the hidden state of each row's newest token, before and after."""
    hidden, buffer = read_chunk(model, inputs, buffer, prompt=True, length=length)
    valid = jnp.asarray(inputs.valid)
    end = jnp.maximum(valid.sum(axis=1) - 1, 0)
    newest = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    return jnp.where(valid.any(axis=1)[:, None], newest, last), buffer


@_on_its_mesh
def prefill(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    cache: CacheConfig,
    *,
    lengths: Sequence[int] | None = None,
    buffer: Buffer | None = None,
) -> tuple[Float[Array, "B V"], Buffer]:
    """Reads prompts and returns the logits after each one's last token.

    Args:
      model: the decoder.
      tokens: prompts, each row's real tokens first.
      cache: what to keep.
      lengths: real tokens in each row; all T by default. A row of length 0 needs a `buffer` and reads nothing: its
        logits mean nothing.
      buffer: an earlier turn's buffer, which the prompts continue; it is donated.

    Raises:
      ValueError: on empty prompts, lengths outside [0, T], a buffer of another batch size or configuration, or a batch
        or budget that does not fit the mesh the model is on.
    """
    B, T = tokens.shape
    count = np.full(B, T) if lengths is None else np.asarray(lengths)
    least = 1 if buffer is None else 0
    if T < 1 or count.shape != (B,) or count.min() < least or count.max() > T:
        raise ValueError(f"lengths must be {B} numbers from {least} to T={T}, T at least 1; got {count.tolist()}")
    held = cache_room.empty(model.config, cache, B) if buffer is None else buffer
    if held.config != cache or held.seen.shape != (B,):
        raise ValueError(
            f"the buffer to continue must have the batch size and configuration of this call, {B} and {cache}; "
            f"got {held.seen.shape[0]} and {held.config}"
        )
    chunk = min(cache.prefill_chunk or T, T)
    last = jnp.zeros((B, model.config.width), model.config.dtype)
    length = held.seen + jnp.asarray(count, jnp.int32)
    for start in range(0, max(int(count.max()), 1), chunk):
        # Every chunk has one shape, so that one compiled program reads a prompt of any length.
        last, held = _prefill_chunk(model, chunk_of(tokens, count, start, chunk), held, last, length)
    return _unembed(model, last), held


_unembed = jax.jit(decoder.unembed)


@_on_its_mesh
@functools.partial(jax.jit, donate_argnames="buffer")
def decode(model: Decoder, next_tokens: Int[AnyArray, " B"], buffer: Buffer) -> tuple[Float[Array, "B V"], Buffer]:
    """Reads one token a row and returns the logits after it; evicts when the recent window is full.

    The buffer is donated: go on with the returned one.
    """
    active = jnp.ones(next_tokens.shape, bool)
    logits, buffer = decode_step(model, jnp.asarray(next_tokens), active, buffer)
    return logits, _evict_if_full(buffer)


def _evict_if_full(buffer: Buffer) -> Buffer:
    """A loop of one turn or none: a conditional would copy the pool where nothing is evicted."""
    with jax.named_scope("evict"):  # for profiles, and for the test that nothing else writes a pool
        return jax.lax.while_loop(_is_full, cache_room.evict_full, buffer)


def _is_full(buffer: Buffer) -> Bool[Array, ""]:
    return jnp.any(buffer.recent_len == buffer.config.recent)


class Output(NamedTuple):
    """What `generate` returns."""

    tokens: list[list[int]]  # new tokens of each prompt, up to and including its stop token
    # prompt_tokens, new_tokens, prefill_seconds, decode_seconds, tokens_per_second (decoding), live (entries),
    # full_live, kv_bytes, full_kv_bytes; what is full is what a full cache would hold
    stats: dict[str, float]
    buffer: Buffer  # holds every token but each row's last


@_on_its_mesh
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    cache: CacheConfig,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_tokens: Sequence[int] = (),
    row_ids: Sequence[int] | None = None,
    buffer: Buffer | None = None,
    on_tokens: Callable[[list[list[int]]], object] | None = None,
) -> Output:
    """Continues each prompt under the budget, in compiled runs of tokens; greedy at temperature 0, else sampled.

    Args:
      model: the decoder.
      prompts: token ids.
      cache: what to keep.
      max_new_tokens: of each prompt.
      temperature: divides the logits before a token is drawn.
      seed: of the draws.
      top_k, top_p, min_p: cut the distribution down, see `sampling.Sampling`.
      stop_tokens: each ends a row.
      row_ids: a number for each prompt, which its draws depend on; its index by default. With numbers of their own,
        prompts get the same samples in whatever batch they are.
      buffer: an earlier turn's buffer, which the prompts continue; it is donated. It lacks that turn's last tokens,
        which the prompts must begin with.
      on_tokens: called with every row's new tokens as they come, a few at a time; a true answer ends generation.

    Raises:
      ValueError: on no or empty prompts, token ids outside the vocabulary, settings out of their range (all listed),
        and as `prefill` does.
    """
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    _check_prompts(model, prompts, row_ids, max_new_tokens)
    drawing = sampling.settings(temperature, top_k, top_p, min_p)
    lengths = [len(p) for p in prompts]
    tokens = padded(prompts, bucket(max(lengths), cache.prefill_chunk))
    how = (
        jax.random.key(seed),
        jnp.asarray(row_ids, jnp.int32),
        drawing,
        jnp.asarray(stop_tokens, jnp.int32),
        jnp.int32(max_new_tokens),
    )
    started = time.perf_counter()
    logits, held = jax.block_until_ready(prefill(model, tokens, cache, lengths=lengths, buffer=buffer))
    prefilled = time.perf_counter()
    new, run = [[] for _ in prompts], _STREAMED if on_tokens else _AT_ONCE
    newest, done = _first_token(logits, *how)
    fresh, count, step = newest[:, None], jnp.ones(len(prompts), jnp.int32), jnp.int32(1)
    while True:
        pieces = [row[:n].tolist() for row, n in zip(*map(sharding.on_host, (fresh, count)), strict=True)]
        for row, piece in zip(new, pieces, strict=True):
            row += piece
        if (on_tokens and on_tokens(pieces)) or sharding.on_host(done).all():
            break
        newest, done, fresh, count, step, held = _decode_run(model, newest, done, held, step, *how, run)
    stats = _stats(model, lengths, new, held, prefilled - started, time.perf_counter() - prefilled)
    return Output(new, stats, held)


# Tokens of one compiled call, whatever the cache's window: between two calls of `on_tokens`, and without it.
_STREAMED, _AT_ONCE = 8, 128


def _check_prompts(
    model: Decoder, prompts: Sequence[Sequence[int]], row_ids: Sequence[int], max_new_tokens: int
) -> None:
    V = model.config.vocab_size
    problems = [f"prompt {i} is empty" for i, p in enumerate(prompts) if not len(p)]
    problems += [
        f"prompt {i} has token {bad[0]}, outside [0, {V})"
        for i, p in enumerate(prompts)
        if (bad := [t for t in p if not 0 <= t < V])
    ]
    problems += ["there must be at least one prompt"] * (not prompts)
    problems += [f"row_ids must be {len(prompts)} numbers, got {len(row_ids)}"] * (len(row_ids) != len(prompts))
    problems += [f"max_new_tokens must be at least 1, got {max_new_tokens}"] * (max_new_tokens < 1)
    if problems:
        raise ValueError("; ".join(problems))


def bucket(length: int, chunk: int | None) -> int:
    """The width that prompts are padded to, at most a quarter more: few widths are few programs to compile."""
    step = 2 ** max(length.bit_length() - 3, 4)
    width = -(-length // step) * step
    return width if chunk is None else min(width, -(-length // chunk) * chunk)


def _stats(
    model: Decoder, lengths: list[int], new: list[list[int]], buffer: Buffer, prefill_seconds: float, seconds: float
) -> dict[str, float]:
    cfg, count, seen = model.config, sum(map(len, new)), int(sharding.on_host(buffer.seen).sum())
    heads = cfg.num_layers * cfg.num_kv_heads
    return {
        "prompt_tokens": float(sum(lengths)),
        "new_tokens": float(count),
        "prefill_seconds": prefill_seconds,
        "decode_seconds": seconds,
        "tokens_per_second": count / seconds,
        "live": float(sharding.on_host(buffer.live).sum()),
        "full_live": float(seen * heads),
        "kv_bytes": float(buffer.nbytes),
        "full_kv_bytes": float(cache_room.full_nbytes(cfg, seen)),
    }


@jax.jit
def _first_token(logits, key, row_ids, drawing, stop_tokens, max_new_tokens):
    token = sampling.sample(logits, key, row_ids, jnp.int32(0), drawing)
    return token, jnp.any(token[:, None] == stop_tokens[None], axis=1) | (max_new_tokens == 1)


class _Run(NamedTuple):
    newest: Int[Array, " B"]  # each row's last token, not yet in the buffer
    done: Bool[Array, " B"]
    buffer: Buffer
    step: Int[Array, ""]  # tokens of a row that goes on
    tokens: Int[Array, "B run"]
    count: Int[Array, " B"]


@functools.partial(jax.jit, static_argnames="run", donate_argnames="buffer")
def _decode_run(model, newest, done, buffer, start, key, row_ids, drawing, stop_tokens, max_new_tokens, run):
    """Up to `run` tokens a row. Between two evictions the pool is only read, so it is never copied."""

    def one_token(s: _Run) -> _Run:
        logits, buffer = decode_step(model, s.newest, ~s.done, s.buffer)
        token = sampling.sample(logits, key, row_ids, s.step, drawing)
        tokens = jax.lax.dynamic_update_index_in_dim(s.tokens, token, s.step - start, axis=1)
        ends = jnp.any(token[:, None] == stop_tokens[None], axis=1) | (s.step + 1 == max_new_tokens)
        newest = jnp.where(s.done, s.newest, token)
        return _Run(newest, s.done | ends, buffer, s.step + 1, tokens, s.count + ~s.done)

    def goes_on(s: _Run) -> Bool[Array, ""]:
        return ~jnp.all(s.done) & (s.step - start < run)

    def until_eviction(s: _Run) -> _Run:
        with jax.named_scope("tokens"):
            s = jax.lax.while_loop(lambda s: goes_on(s) & ~_is_full(s.buffer), one_token, s)
        return s._replace(buffer=_evict_if_full(s.buffer))

    B = newest.shape[0]
    first = _Run(newest, done, buffer, start, jnp.zeros((B, run), jnp.int32), jnp.zeros(B, jnp.int32))
    with jax.named_scope("run"):
        end = jax.lax.while_loop(goes_on, until_eviction, first)
    return end.newest, end.done, end.tokens, end.count, end.step, end.buffer


def lower_run(model: Decoder, buffer: Buffer, run: int) -> jax.stages.Lowered:
    """What `generate` runs again and again, up to `run` tokens a row, lowered from shapes on the mesh that was entered.

    Its loops stand in named scopes: `run`, of a turn for each eviction, and in it `tokens` and `evict`, of one or none.
    """
    row = lambda dtype: jax.ShapeDtypeStruct(buffer.seen.shape, dtype, sharding=buffer.seen.sharding)
    one, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    drawing, stops = jax.eval_shape(lambda: (sampling.settings(0.0, 0, 1.0, 0.0), jnp.zeros(1, jnp.int32)))
    how = key, row(jnp.int32), drawing, stops, one
    return _decode_run.lower(model, row(jnp.int32), row(jnp.bool_), buffer, one, *how, run=run)

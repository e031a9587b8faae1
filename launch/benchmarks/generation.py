"""Decoding and prefill, with the full cache beside every budget.

Measured through `rj.prefill` and `rj.generate`, as users call them; a compiler estimates the two programs behind them:
a step that reads a token or a chunk, and an eviction. The full cache is the same buffer with a budget for everything.
"""

import functools
import statistics
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import retention_jax as rj
from retention_jax.cache import empty, evict_full
from retention_jax.cache.buffer import Buffer
from retention_jax.generation import decoding
from retention_jax.models.inputs import Inputs

from .programs import Case, Ceilings, Row, median_seconds, peak_bytes, random_prompts, rates
from .settings import Settings, Work, decoding_work, new_model, reading_work


def _caches(settings: Settings, room: int) -> list[tuple[str, rj.CacheConfig]]:
    """The full cache, which has `room` for all tokens of a sequence, and the budgets."""
    config = functools.partial(rj.CacheConfig, recent=settings.recent, prefill_chunk=settings.chunk)
    return [("full", config(budget=room)), *((f"budget {m}", config(budget=m)) for m in settings.budgets)]


def decode(settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    """Reads a context once, then decodes from there again and again, `new_tokens` at a time."""
    model = jax.jit(lambda: new_model(settings))()
    count, runs = settings.new_tokens, settings.repeats + 1
    for batch, context in settings.cells:
        baseline = None
        for name, cache in _caches(settings, context + runs * count + settings.recent):
            _, buffer = rj.prefill(model, random_prompts(settings.model.vocab_size, batch, context), cache)
            seconds = []
            for _ in range(runs):  # the first compiles
                # The feed is one token; what comes out of its logits is the first new token, and no decoding.
                out = rj.generate(model, [[0]] * batch, cache, max_new_tokens=count, buffer=buffer)
                buffer = out.buffer
                seconds.append(out.stats["decode_seconds"] / (count - 1))
            one_token = statistics.median(seconds[1:])
            live = float(jnp.mean(buffer.live)) / settings.heads
            row = {"batch": batch, "context": context, "what": name, "kv_bytes": buffer.nbytes}
            row |= rates(one_token, batch, decoding_work(settings, batch, live), ceilings)
            eviction, buffer = _eviction_seconds(buffer, settings.repeats)
            row |= {"eviction_milliseconds": 1e3 * eviction, "peak_bytes": peak_bytes()}
            row["of_eviction"] = eviction / (settings.recent * one_token)
            if baseline is not None:
                row["note"] = f"{baseline / one_token:.2f} x full"
            baseline = baseline or one_token
            yield row


def _eviction_seconds(buffer: Buffer, repeats: int) -> tuple[float, Buffer]:
    evict = jax.jit(evict_window, donate_argnums=0)

    def call() -> Buffer:
        nonlocal buffer
        buffer = evict(buffer)
        return buffer

    return median_seconds(call, repeats), buffer


def evict_window(buffer: Buffer) -> Buffer:
    """One eviction, as if every row's recent window were full."""
    return evict_full(buffer._replace(recent_len=jnp.full_like(buffer.recent_len, buffer.config.recent)))


def prefill(settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    """Reads whole prompts, chunk by chunk."""
    model = jax.jit(lambda: new_model(settings))()
    for batch, context in settings.cells:
        baseline, prompts = None, random_prompts(settings.model.vocab_size, batch, context)
        for name, cache in _caches(settings, context):
            seconds = median_seconds(functools.partial(rj.prefill, model, prompts, cache), settings.repeats)
            row = {"batch": batch, "context": context, "what": name}
            work = reading_work(settings, batch, context, 0, cache.budget)
            row |= rates(seconds, batch * context, work, ceilings) | {"peak_bytes": peak_bytes()}
            if baseline is not None:
                row["note"] = f"{baseline / seconds:.2f} x full"
            baseline = baseline or seconds
            yield row


def _arguments(settings: Settings, cache: rj.CacheConfig, batch: int, tokens: int) -> tuple:
    """Of `decode_step` and `read_chunk`, but for the model's place: the buffer comes first, since it is donated."""
    buffer = empty(settings.model, cache, batch)
    return buffer, new_model(settings), jnp.zeros((batch, tokens), jnp.int32), jnp.ones((batch, tokens), bool)


def _step(buffer, model, tokens, valid):
    logits, buffer = decoding.decode_step(model, tokens[:, 0], valid[:, 0], buffer)
    return buffer, logits


def _chunk(buffer, model, tokens, valid):
    read, buffer = decoding.read_chunk(model, Inputs(tokens, valid), buffer, prompt=True)
    return buffer, read.hidden


def _eviction(buffer):
    return (evict_window(buffer),)


def decode_cases(settings: Settings) -> Iterator[Case]:
    """The decoding step over a full buffer, and the eviction that comes every R steps."""
    for batch, context in settings.cells:
        for name, cache in _caches(settings, context):
            labels: Row = {"batch": batch, "context": context}
            args = functools.partial(_arguments, settings, cache, batch, 1)
            work = decoding_work(settings, batch, min(context, cache.budget) + settings.recent / 2)
            yield Case(labels | {"what": f"{name}, step"}, _step, args, batch, work, donates=True)
            entries = batch * settings.heads * (2 * cache.budget + settings.recent)  # read all, write the pool
            make = functools.partial(lambda *a: (empty(*a),), settings.model, cache, batch)
            work = Work(0.0, entries * settings.entry_bytes)
            yield Case(labels | {"what": f"{name}, eviction"}, _eviction, make, batch, work, donates=True)


def prefill_cases(settings: Settings) -> Iterator[Case]:
    """The last chunk of a prompt."""
    for batch, context in settings.cells:
        for name, cache in _caches(settings, context):
            chunk = min(settings.chunk, context)
            args = functools.partial(_arguments, settings, cache, batch, chunk)
            work = reading_work(settings, batch, chunk, context - chunk, cache.budget)
            labels: Row = {"batch": batch, "context": context, "what": f"{name}, chunk of {chunk}"}
            yield Case(labels, _chunk, args, batch * chunk, work, donates=True)

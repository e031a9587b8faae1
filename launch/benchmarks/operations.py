"""Single operations beside what else does the same: attention, retention mass, eviction.

`log_beta` is drawn from -1e-4 to 0: at 16K tokens nothing has decayed away and kernels can skip nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import retention_jax as rj
from retention_jax.cache.buffer import Buffer, Entries
from retention_jax.kernels import ops, reference

from .generation import evict_window
from .programs import Case, Ceilings, Row, measure
from .settings import Settings, Work, attention_flops


def _log_beta(*shape: int) -> jax.Array:
    return -1e-4 * jax.random.uniform(jax.random.key(1), shape)


def _forward_and_backward(operation: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    """The gradients of the first so many arguments; ones stand for the gradient of the result."""

    def both(*args):
        out, pull = jax.vjp(lambda *differentiated: operation(*differentiated, *args[inputs:]), *args[:inputs])
        return out, pull(jnp.ones_like(out))

    return both


def attention_cases(settings: Settings) -> Iterator[Case]:
    """One layer of the model's shape: unbiased attention, bias in a T x T array, and ours."""
    model = settings.model
    one_layer = settings.with_layers(1).model
    N, K, H, itemsize = model.num_heads, model.num_kv_heads, model.head_size, jnp.dtype(model.dtype).itemsize
    library = "cudnn" if jax.default_backend() == "gpu" and model.dtype == "bfloat16" else "xla"
    dot_product = f"dot_product_attention, {library}"

    def unbiased(q, k, v, log_beta, segment_ids):
        del log_beta, segment_ids
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=library)

    def make(batch: int, tokens: int):
        draw = lambda key, heads: jax.random.normal(jax.random.key(key), (batch, tokens, heads, H), model.dtype)
        return draw(2, N), draw(3, K), draw(4, K), _log_beta(batch, K, tokens), jnp.ones((batch, tokens), jnp.int32)

    for batch, tokens in settings.cells:
        flops = batch * attention_flops(one_layer, tokens * (tokens + 1) / 2)
        arrays = batch * tokens * 2 * (N + K) * H * itemsize
        args = functools.partial(make, batch, tokens)
        for name, operation, versus in (
            (dot_product, unbiased, ()),
            ("T x T bias", reference.retention_attention, (dot_product,)),
            ("retention_attention", ops.retention_attention, (dot_product, "T x T bias")),
        ):
            labels: Row = {"batch": batch, "context": tokens, "what": name}
            forward = labels | {"pass": "forward"}
            yield Case(forward, operation, args, batch * tokens, Work(flops, arrays), versus=versus)
            both, work = _forward_and_backward(operation, 4), Work(3.5 * flops, 3 * arrays)
            yield Case(labels | {"pass": "and backward"}, both, args, batch * tokens, work, versus=versus)


def mass_cases(settings: Settings) -> Iterator[Case]:
    """All layers and heads of a training step's sequences."""
    for batch, tokens in settings.cells:
        make = lambda batch=batch, tokens=tokens: (
            _log_beta(batch, settings.heads, tokens),
            jnp.ones((batch, tokens), jnp.int32),
        )
        array = 4 * batch * settings.heads * tokens
        pairs = batch * settings.heads * tokens * (tokens + 1) / 2
        for name, operation, versus in (
            ("T x T", reference.retention_mass, ()),
            ("retention_mass", ops.retention_mass, ("T x T",)),
        ):
            labels: Row = {"batch": batch, "context": tokens, "what": name}
            # A product, an exponential and a sum for each pair of token and entry.
            forward = Work(3 * pairs, 2 * array)
            yield Case(labels | {"pass": "forward"}, operation, make, batch * tokens, forward, versus=versus)
            both, work = _forward_and_backward(operation, 1), Work(9 * pairs, 4 * array)
            yield Case(labels | {"pass": "and backward"}, both, make, batch * tokens, work, versus=versus)


def _select(score, pos, head, live, capacity: int) -> jax.Array:
    return ops.select_top(score, pos, head, live, capacity=capacity, groups=1, heads_of_group=1, shared=0)


def _sort(score, pos, head, live, capacity: int) -> jax.Array:
    del pos, head, live  # all are
    return jax.lax.top_k(score, capacity)[1]


def _candidates(settings: Settings, batch: int, budget: int) -> tuple[jax.Array, ...]:
    """Scores, positions, heads and marks of a full pool and window, all live, newest first and by head: `top_k`, which
    prefers the earlier of two equal scores, then has to choose the same survivors."""
    tokens, heads = budget + settings.recent, settings.heads
    pos = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32)[::-1], heads)[None]
    head = jnp.tile(jnp.arange(heads, dtype=jnp.int32), tokens)[None]
    log_beta = -jnp.exp(4 * jax.random.normal(jax.random.key(5), (batch, tokens * heads)))
    alike = lambda a: jnp.broadcast_to(a, log_beta.shape)
    return (tokens + 1 - pos) * log_beta, alike(pos), alike(head), jnp.ones(log_beta.shape, bool)


def _full_buffer(settings: Settings, budget: int, batch: int) -> Buffer:
    """Every head owns as many slots of the pool, over twice as many tokens as it holds, and the window is full."""
    model, heads, R = settings.model, settings.heads, settings.recent
    L, K, H = model.num_layers, model.num_kv_heads, model.head_size
    seen = 2 * budget

    def entries(pos: jax.Array, *axes: int) -> Entries:
        draw = lambda key: jax.random.normal(jax.random.key(key), (*axes, H), model.dtype)
        log_beta = -jnp.exp(4 * jax.random.normal(jax.random.key(5), axes))
        return Entries(draw(6), draw(7), log_beta, jnp.broadcast_to(pos, axes))

    return Buffer(
        pool=entries(jnp.tile(2 * jnp.arange(budget, dtype=jnp.int32), heads)[None], batch, heads * budget),
        offset=jnp.broadcast_to(budget * jnp.arange(heads + 1, dtype=jnp.int32), (batch, heads + 1)),
        recent=entries(seen + jnp.arange(R, dtype=jnp.int32)[None, None, None], batch, L, K, R),
        recent_len=jnp.full(batch, R, jnp.int32),
        seen=jnp.full(batch, seen + R, jnp.int32),
        queries=None,
        shift=None,
        windows=None,
        config=rj.CacheConfig(budget=budget, recent=R),
    )


def evict_cases(settings: Settings) -> Iterator[Case]:
    """Which entries stay, by a sort and by a threshold search; and a whole eviction, packing included."""
    for batch in settings.batches:
        for budget in settings.budgets:
            entries, capacity = batch * settings.heads * (budget + settings.recent), settings.heads * budget
            labels: Row = {"batch": batch, "budget": budget}
            make = functools.partial(_candidates, settings, batch, budget)
            read_once = Work(0.0, 14.0 * entries)  # score, position, head, two marks
            sort = functools.partial(_sort, capacity=capacity)
            select = functools.partial(_select, capacity=capacity)
            yield Case(labels | {"what": "jax.lax.top_k"}, sort, make, entries, read_once)
            chosen = labels | {"what": "threshold search"}
            yield Case(chosen, select, make, entries, read_once, versus=("jax.lax.top_k",))
            moved = Work(0.0, (entries + batch * capacity) * settings.entry_bytes)
            full = functools.partial(lambda *sizes: (_full_buffer(*sizes),), settings, budget, batch)
            evict = lambda buffer: (evict_window(buffer),)
            yield Case(labels | {"what": "whole eviction"}, evict, full, entries, moved, donates=True)


def evict(settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    """Measures `evict_cases` once both selections have been seen to be the same.

    Raises:
      RuntimeError: if they are not.
    """
    for batch in settings.batches:
        for budget in settings.budgets:
            capacity = settings.heads * budget
            args = jax.jit(_candidates, static_argnums=(0, 1, 2))(settings, batch, budget)
            kept = np.asarray(jax.jit(_select, static_argnums=4)(*args, capacity))
            want = np.zeros_like(kept)
            np.put_along_axis(want, np.asarray(jax.jit(_sort, static_argnums=4)(*args, capacity)), True, axis=1)
            if (kept != want).any():
                raise RuntimeError(f"the two selections differ in {(kept != want).sum()} of {kept.size} entries")
    for row in measure(evict_cases(settings), ceilings, settings.repeats):
        yield row | {"note": f"{row['note']}, same survivors"} if row["what"] == "threshold search" else row

"""From tokens to an evicted cache, one call at a time: prefill a chunk or a prompt, decode a token.

Every function here extends the model by some tokens, then lets the cache take the new entries in. `runs.py` builds
generation on top of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax.cache import append, empty, evict_first_full, evict_full, queries_wanted, take_in
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder, Extended
from retention_jax.models.inputs import Inputs, Row, chunk_of
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray
from retention_jax.vision.prompt import Prompt

P = ParamSpec("P")
R = TypeVar("R")


def on_its_mesh(function: Callable[Concatenate[Decoder, P], R]) -> Callable[Concatenate[Decoder, P], R]:
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
) -> tuple[Extended, Buffer]:
    """Reads a chunk: attends to the buffer and the chunk, then merges the chunk into the pool.

    Args:
      model: the decoder.
      inputs: the chunk, [B, C].
      buffer: what is remembered so far.
      prompt: whether the chunk is part of a prompt, which some policies keep.
      length: tokens of each row once its whole prompt is read, as in `decoder.extend`.
      outlook: as in `cache.take_in`.

    Returns:
      What reading the chunk gave, and the buffer with the chunk in it.
    """
    wanted = queries_wanted(buffer.config, inputs.tokens.shape[1])
    read, valid = decoder.extend(model, inputs, buffer, queries=wanted, length=length), jnp.asarray(inputs.valid)
    buffer = take_in(buffer, read.entries, valid, read.queries, outlook, prompt=prompt)
    if inputs.visual is not None and buffer.shift is not None:
        buffer = buffer._replace(shift=buffer.shift + jnp.asarray(inputs.visual.next_shift))
    return read, buffer


def decode_step(
    model: Decoder, tokens: Int[Array, " B"], active: Bool[Array, " B"], buffer: Buffer
) -> tuple[Float[Array, "B V"], Buffer]:
    """Reads one token a row behind the row's recent ones, without evicting. Returns the logits after it.

    An inactive row takes nothing in. Its logits mean nothing.
    """
    inputs, wanted = Inputs(tokens[:, None], active[:, None]), queries_wanted(buffer.config, 1)
    read = decoder.extend(model, inputs, buffer, queries=wanted)
    return decoder.unembed(model, read.hidden[:, 0]), append(buffer, read.entries, active, read.queries)


@functools.partial(jax.jit, donate_argnames=("buffer", "last"))
def _prefill_chunk(
    model: Decoder, inputs: Inputs, buffer: Buffer, last: Float[Array, "B D"], length: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Buffer]:
    """Reads a chunk of prompts. `last` is the hidden state of each row's newest token, before and after."""
    read, buffer = read_chunk(model, inputs, buffer, prompt=True, length=length)
    valid = jnp.asarray(inputs.valid)
    end = jnp.maximum(valid.sum(axis=1) - 1, 0)
    newest = jnp.take_along_axis(read.hidden, end[:, None, None], axis=1)[:, 0]
    return jnp.where(valid.any(axis=1)[:, None], newest, last), buffer


@on_its_mesh
def prefill(
    model: Decoder,
    tokens: Int[AnyArray, "B T"] | Prompt | Sequence[Row],
    cache: CacheConfig,
    *,
    lengths: Sequence[int] | None = None,
    buffer: Buffer | None = None,
) -> tuple[Float[Array, "B V"], Buffer]:
    """Reads prompts and returns the logits after each one's last token.

    Args:
      model: the decoder.
      tokens: prompts, each row's real tokens first; or one prompt with pictures, or several.
      cache: what to keep.
      lengths: real tokens in each row of an array; all T by default. A row of length 0 needs a `buffer` and reads
        nothing: its logits mean nothing.
      buffer: an earlier turn's buffer, which the prompts continue; it is donated.

    Raises:
      ValueError: on empty prompts, lengths outside [0, T], pictures for a model without a tower, a buffer of another
        batch size or configuration, or a batch or budget that does not fit the mesh the model is on.
    """
    whole = decoder.batch_of(model, tokens)
    B, T = whole.tokens.shape
    count = np.asarray(whole.valid).sum(axis=1) if lengths is None else np.asarray(lengths)
    least = 1 if buffer is None else 0
    if T < 1 or count.shape != (B,) or count.min() < least or count.max() > T:
        raise ValueError(f"lengths must be {B} numbers from {least} to T={T}, T at least 1; got {count.tolist()}")
    return read_prompts(model, whole._replace(valid=np.arange(T)[None] < count[:, None]), cache, buffer)


def read_prompts(
    model: Decoder, whole: Inputs, cache: CacheConfig, buffer: Buffer | None
) -> tuple[Float[Array, "B V"], Buffer]:
    """`prefill` of rows that are one value already, on the mesh that was entered; raises what it does of buffers."""
    B, T = whole.tokens.shape
    held = empty(model.config, cache, B) if buffer is None else buffer
    if held.config != cache or held.seen.shape != (B,):
        raise ValueError(
            f"the buffer to continue must have the batch size and configuration of this call, {B} and {cache}; "
            f"got {held.seen.shape[0]} and {held.config}"
        )
    chunk, count = min(cache.prefill_chunk or T, T), np.asarray(whole.valid).sum(axis=1)
    last = jnp.zeros((B, model.config.width), model.config.dtype)
    length = held.seen + jnp.asarray(count, jnp.int32)
    for start in range(0, max(int(count.max()), 1), chunk):
        # Every chunk has one shape, so that one compiled program reads a prompt of any length.
        last, held = _prefill_chunk(model, chunk_of(whole, start, chunk), held, last, length)
    return _unembed(model, last), held


_unembed = jax.jit(decoder.unembed)


@on_its_mesh
@functools.partial(jax.jit, donate_argnames="buffer")
def decode(model: Decoder, next_tokens: Int[AnyArray, " B"], buffer: Buffer) -> tuple[Float[Array, "B V"], Buffer]:
    """Reads one token a row and returns the logits after it. Evicts in rows where `cache.recent` tokens are recent.

    The buffer is donated: go on with the returned one.
    """
    active = jnp.ones(next_tokens.shape, bool)
    logits, buffer = decode_step(model, jnp.asarray(next_tokens), active, buffer)
    return logits, evict_if_full(buffer)


def evict_if_full(buffer: Buffer, *, row_by_row: bool = False) -> Buffer:
    """Evicts in the rows whose recent tokens fill their place.

    It is a loop of one turn or none, since a conditional would copy the pool where nothing is evicted. `row_by_row` it
    has a turn for each such row: the same evictions, cheaper where rows fill up at different times.
    """
    with jax.named_scope("evict"):  # for profiles, and for the test that nothing else writes a pool
        return jax.lax.while_loop(is_full, evict_first_full if row_by_row else evict_full, buffer)


def is_full(buffer: Buffer) -> Bool[Array, ""]:
    """Whether any row has as many recent tokens as there is room for."""
    return jnp.any(buffer.recent_len == buffer.config.recent)


def bucket(length: int, chunk: int | None) -> int:
    """The width that prompts of at most `length` tokens are padded to: few widths are few programs to compile.

    It is at most a quarter more than `length`, or 16, or a multiple of `chunk` tokens, whichever is less.
    """
    step = 2 ** max(length.bit_length() - 3, 4)
    width = -(-length // step) * step
    return width if chunk is None else min(width, -(-length // chunk) * chunk)

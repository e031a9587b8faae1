"""The engine's compiled programs. Their shapes never change, so a row's numbers do not depend on the others.

read     a part of one prompt, in a buffer of batch 1
begin    the token that follows a prompt
decode   a run of tokens for all rows

With `insert_row`, `take_row` and `reset_row` of the cache they are all that a server runs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax.cache.buffer import Buffer
from retention_jax.generation import decoding, runs, sampling
from retention_jax.generation.runs import DecodeState, Limits
from retention_jax.generation.sampling import LogProbs, Sampling
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs, Visual
from retention_jax.runtime.arrays import AnyArray

MOST_STOPS = 16  # stop tokens of a row
NO_TOKEN = -1
_LEAST_READ = 32  # tokens; narrower programs would hardly be quicker
_LOGITS_BLOCK = 64  # tokens of a prompt whose vocabulary logits exist at one time


class Settings(NamedTuple):
    """What each row's request asks for, written in place on the host."""

    temperature: Float[AnyArray, " B"]
    top_k: Int[AnyArray, " B"]
    top_p: Float[AnyArray, " B"]
    min_p: Float[AnyArray, " B"]
    seed: Int[AnyArray, " B"]
    row_id: Int[AnyArray, " B"]
    max_new_tokens: Int[AnyArray, " B"]
    stop_tokens: Int[AnyArray, "B stops"]
    wanted: Bool[AnyArray, " B"]  # whether log-probabilities are asked for


class Standing(NamedTuple):
    """Where each row stands, as in `DecodeState`, on the host."""

    newest: Int[AnyArray, " B"]
    done: Bool[AnyArray, " B"]
    step: Int[AnyArray, " B"]


class Read(NamedTuple):
    """What reading a part of a prompt gives."""

    hidden: Float[Array, "1 D"]  # of its last token
    buffer: Buffer
    log_probs: LogProbs  # [width], of each token's next one; zeros where they are not asked for


class Made(NamedTuple):
    """New tokens of all rows."""

    standing: Standing
    tokens: Int[AnyArray, "B run"]
    count: Int[AnyArray, " B"]  # real ones
    log_probs: LogProbs  # [B, run]
    live: Int[AnyArray, " B"]  # entries of each row afterwards


def blank(rows: int) -> tuple[Settings, Standing]:
    """Rows without a request."""
    zeros = lambda dtype: np.zeros(rows, dtype)
    settings = Settings(
        temperature=zeros(np.float32),
        top_k=zeros(np.int32),
        top_p=zeros(np.float32) + 1,
        min_p=zeros(np.float32),
        seed=zeros(np.int32),
        row_id=zeros(np.int32),
        max_new_tokens=zeros(np.int32) + 1,
        stop_tokens=np.full((rows, MOST_STOPS), NO_TOKEN, np.int32),
        wanted=zeros(bool),
    )
    return settings, Standing(zeros(np.int32), np.ones(rows, bool), zeros(np.int32))


def widths(chunk: int) -> list[int]:
    """Tokens that one program reads: whole chunks, and halves of halves for what is left behind them."""
    found = [chunk]
    while found[-1] > _LEAST_READ:
        found.append(-(-found[-1] // 2))
    return found[::-1]


@functools.partial(jax.jit, donate_argnames="buffer")
def read(
    model: Decoder,
    tokens: Int[AnyArray, "1 width"],
    following: Int[AnyArray, "1 width"],
    count: Int[AnyArray, ""],
    length: Int[AnyArray, " 1"],
    buffer: Buffer,
    wanted: Bool[AnyArray, ""],
    visual: Visual | None,
) -> Read:
    """Reads the next part of a prompt.

    Args:
      model: the decoder.
      tokens: the part; padding behind its `count` tokens.
      following: the token after each.
      count: real tokens, at least one.
      length: of the whole prompt, as in `decoder.extend`.
      buffer: what was read before. It is donated.
      wanted: whether the log-probabilities of `following` are.
      visual: what stands beside the part where the prompt has pictures.
    """
    valid = jnp.arange(tokens.shape[1])[None] < count
    read, buffer = decoding.read_chunk(
        model, Inputs(jnp.asarray(tokens), valid, visual), buffer, prompt=True, length=jnp.asarray(length)
    )

    def told(hidden: Float[Array, "width D"], token: Int[Array, " width"]) -> LogProbs:
        one = lambda pair: sampling.log_probs(decoder.unembed(model, pair[0])[None], pair[1][None])
        found = jax.lax.map(one, (hidden, token), batch_size=_LOGITS_BLOCK)
        return jax.tree.map(lambda a: a[:, 0], found)

    nothing = lambda hidden, _: sampling.no_log_probs(hidden.shape[:1], model.config.vocab_size)
    log_probs = jax.lax.cond(wanted, told, nothing, read.hidden[0], jnp.asarray(following)[0])
    last = jax.lax.dynamic_index_in_dim(read.hidden, count - 1, axis=1, keepdims=False)
    return Read(last, buffer, log_probs)


def _ask(settings: Settings) -> tuple[Sampling, Limits]:
    array = jnp.asarray
    key = sampling.row_keys(array(settings.seed), array(settings.row_id))
    numbers = map(array, (settings.temperature, settings.top_k, settings.top_p, settings.min_p))
    return Sampling(*numbers, key=key), Limits(array(settings.max_new_tokens), array(settings.stop_tokens))


@jax.jit
def begin(model: Decoder, hidden: Float[Array, "1 D"], buffer: Buffer, settings: Settings) -> Made:
    """The token after a prompt that was read, by the settings of its one row."""
    how, limits = _ask(settings)
    logits = decoder.unembed(model, hidden)
    token, done, step = runs.first_tokens(logits, how, limits)
    nothing = lambda *_: sampling.no_log_probs((1,), model.config.vocab_size)
    found = jax.lax.cond(jnp.any(settings.wanted), sampling.log_probs, nothing, logits, token)
    return Made(
        Standing(token, done, step), token[:, None], step, jax.tree.map(lambda a: a[:, None], found), buffer.live
    )


@functools.partial(jax.jit, static_argnames="run", donate_argnames="buffer")
def decode(model: Decoder, buffer: Buffer, standing: Standing, settings: Settings, run: int) -> tuple[Buffer, Made]:
    """Up to `run` tokens of each row. The buffer is donated."""
    how, limits = _ask(settings)
    state = DecodeState(*map(jnp.asarray, standing), buffer=buffer)
    state, tokens, count, log_probs = runs.decode_run(
        model, state, how, limits, run, wanted=jnp.asarray(settings.wanted), row_by_row=True
    )
    after = Standing(state.newest, state.done, state.step)
    return state.buffer, Made(after, tokens, count, log_probs, state.buffer.live)

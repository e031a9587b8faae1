"""Scores of every next token of a sequence: with a full cache, and with what a buffer kept until then."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retention_jax.cache import empty, window_sizes
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.generation.decoding import read_chunk
from retention_jax.kernels import ops
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray

_LOGITS_BLOCK = 4096  # tokens whose vocabulary logits exist at one time, in the full cache's forward pass


class Scores(NamedTuple):
    """Column t is about token t + 1, after tokens 0 .. t were read."""

    log_prob: Float[AnyArray, "B T_less_1"]  # natural log of the next token's probability
    best: Int[AnyArray, "B T_less_1"]  # the likeliest next token


@jax.jit
def score_full(model: Decoder, tokens: Int[Array, "B T"]) -> Scores:
    """The scores of `score_stream` with a cache that keeps everything: one forward pass, ordinary attention."""
    hidden, _ = decoder.forward(model, tokens, jnp.ones_like(tokens), with_retention=False)

    def one_token(token: tuple[Float[Array, " D"], Int[Array, ""]]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        log_probs = jax.nn.log_softmax(decoder.unembed(model, token[0]))
        return log_probs[token[1]], jnp.argmax(log_probs).astype(jnp.int32)

    flat = (hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1))
    by_row = lambda a: a.reshape(tokens.shape[0], tokens.shape[1] - 1)
    return Scores(*map(by_row, jax.lax.map(one_token, flat, batch_size=_LOGITS_BLOCK)))


def score_stream(
    model: Decoder, tokens: Int[AnyArray, "B T"], cache: CacheConfig, lengths: Int[AnyArray, " B"]
) -> tuple[Scores, Buffer]:
    """Feeds sequences through the buffer in chunks of R tokens, evicting after each, and scores every next token.

    The same as decoding token by token with the sequence's own tokens. Also returns the buffer at the end.

    Args:
      model: the decoder.
      tokens: sequences, each row's real tokens first.
      cache: what to keep.
      lengths: real tokens in each row. Scores behind them mean nothing.

    Raises:
      ValueError: when batch or budget do not fit the mesh that the model is on.
    """
    with sharding.enter_mesh_of(model):
        make = functools.partial(empty, model.config, cache, tokens.shape[0])
        outlook = functools.partial(_outlook, cache=cache) if cache.row.needs_future else None
        scores, buffer = StreamPrograms(cache.recent, make, outlook, _score_chunk).read(model, tokens, lengths)
        together = lambda parts: jnp.concatenate(parts, axis=1)[:, : tokens.shape[1] - 1]
        return Scores(*map(together, zip(*scores, strict=True))), buffer


class StreamPrograms(NamedTuple):
    """What reads sequences of any length through one kind of buffer, on the mesh that is entered."""

    recent: int  # tokens of a chunk
    empty: Callable[[], Buffer]
    outlook: Callable[..., Float[Array, "chunks B L K all"]] | None  # for the oracle
    chunk: Callable[..., tuple[Buffer, Scores]]

    def read(
        self, model: Decoder, tokens: Int[AnyArray, "B T"], lengths: Int[AnyArray, " B"]
    ) -> tuple[list[Scores], Buffer]:
        """The scores of each chunk, the last one padded, and the buffer at the end."""
        (B, T), R = tokens.shape, self.recent
        read = -(-T // R) * R
        padded = np.zeros((B, read + 1), np.int32)
        padded[:, :T] = np.asarray(tokens)
        valid = np.arange(read)[None] < np.asarray(lengths)[:, None]
        worth = None if self.outlook is None else self.outlook(model, padded[:, :-1], valid)
        buffer, found = self.empty(), []
        for i, start in enumerate(range(0, read, R)):
            known = None if worth is None else jax.lax.dynamic_index_in_dim(worth, i, keepdims=False)
            chunk = padded[:, start : start + R + 1], valid[:, start : start + R]
            buffer, scores = self.chunk(model, buffer, *chunk, known)
            found.append(scores)
        return found, buffer


def compile_stream(
    model: Decoder, batch: int, cache: CacheConfig, length: int
) -> tuple[StreamPrograms, list[jax.stages.Compiled]]:
    """The programs of `score_stream` for so many sequences, compiled beforehand; and once more, to ask for their sizes.

    They read sequences of any length, but for the oracle's: those read sequences of `length` tokens.
    """
    with sharding.enter_mesh_of(model):
        R = cache.recent
        chunks = -(-length // R)
        make = jax.jit(functools.partial(empty, model.config, cache, batch)).lower().compile()
        tokens, valid = np.zeros((batch, chunks * R + 1), np.int32), np.ones((batch, chunks * R), bool)
        outlook, known = None, None
        if cache.row.needs_future:
            outlook = _outlook.lower(model, tokens[:, :-1], valid, cache=cache).compile()
            known = jax.lax.dynamic_index_in_dim(outlook(model, tokens[:, :-1], valid), 0, keepdims=False)
        chunk = _score_chunk.lower(model, make(), tokens[:, : R + 1], valid[:, :R], known).compile()
    programs = [program for program in (make, outlook, chunk) if program is not None]
    return StreamPrograms(R, make, outlook, chunk), programs


@functools.partial(jax.jit, donate_argnames="buffer")
def _score_chunk(
    model: Decoder,
    buffer: Buffer,
    tokens: Int[Array, "B R_and_1"],
    valid: Bool[Array, "B R"],
    outlook: Float[Array, "B L K all"] | None,
) -> tuple[Buffer, Scores]:
    """Reads all tokens but the last, which is only predicted; what was kept of them, and how they were predicted."""
    read, buffer = read_chunk(model, Inputs(tokens[:, :-1], valid), buffer, prompt=False, outlook=outlook)
    log_probs = jax.nn.log_softmax(decoder.unembed(model, read.hidden), axis=-1)
    log_prob = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    scores = Scores(log_prob, jnp.argmax(log_probs, axis=-1).astype(jnp.int32))
    return buffer, jax.tree.map(lambda a: sharding.constrain(a, "scores"), scores)


@functools.partial(jax.jit, static_argnames="cache")
def _outlook(
    model: Decoder, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], cache: CacheConfig
) -> Float[Array, "chunks B L K T"]:
    """For each chunk of R tokens, the attention that every token will get after it in a full cache, all later queries
    and the group's heads together: T/R times B*L*K*T float32, as no other policy needs.

    Ranking by it is the oracle: greedy on the full cache's attention, and so not the best that could be kept.
    """
    (B, T), cfg, R = tokens.shape, model.config, cache.recent
    nothing = empty(cfg, CacheConfig(budget=1, recent=1), B)
    read = decoder.extend(model, Inputs(tokens, valid), nothing, queries=T)
    new, q, sizes = read.entries, read.queries, window_sizes(cfg.windows)
    assert q is not None  # T of them were asked for

    def one_layer(l):
        k, pos = (jax.lax.dynamic_index_in_dim(a, l, 1, keepdims=False) for a in (new.k, new.pos))
        of_layer = jax.lax.dynamic_index_in_dim(q, l, 1, keepdims=False)
        window = None if sizes is None else sizes[l]

        def one_chunk(start):
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, R, 1)
            return ops.attention_received(cut(of_layer), cut(pos[:, 0]), k, pos, window).sum(axis=2)

        got = jax.lax.map(one_chunk, jnp.arange(0, T, R, dtype=jnp.int32))
        return jnp.flip(jnp.cumsum(jnp.flip(got, 0), axis=0), 0) - got

    return jax.lax.map(one_layer, jnp.arange(cfg.num_layers, dtype=jnp.int32)).transpose(1, 2, 0, 3, 4)

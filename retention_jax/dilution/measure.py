"""Where attention falls, token by token, while sequences go through the buffer."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from retention_jax.cache import attend, empty, queries_wanted, take_in, window_sizes
from retention_jax.cache.buffer import Buffer, Entries
from retention_jax.config import CacheConfig
from retention_jax.kernels import ops
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs
from retention_jax.runtime.arrays import AnyArray


class Measured(NamedTuple):
    """Where the attention of every token falls, by layer and query head. Means nothing at tokens that ask nothing."""

    asked: Float[Array, "B T L N"]  # share of attention on tokens that tell of the fact asked for; the rest is dilution
    any_fact: Float[Array, "B T L N"]  # share on tokens that tell of some fact
    useful: Float[Array, "B T L N"]  # tokens seen that tell of the fact asked for
    seen: Float[Array, "B T L N"]  # all tokens seen, this one included
    best: Int[Array, "B T"]  # the likeliest next token


@functools.partial(jax.jit, static_argnames="cache")
def measure(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    facts: Bool[AnyArray, "B T facts"],
    asked: Int[AnyArray, "B T"],
    cache: CacheConfig,
) -> Measured:
    """Feeds sequences through the buffer as `scoring.score_stream` does, and measures what each token attends to.

    Args:
      model: the decoder.
      tokens: sequences of equal length.
      facts: which facts each token tells of.
      asked: the fact that the prediction at each token needs, an index of the last axis of `facts`; any where it needs
        none.
      cache: what is kept. With `recent` of at least T nothing is evicted before the last token: the full cache.
    """
    B, T = tokens.shape
    R = min(cache.recent, T)
    chunks = -(-T // R)
    valid = jnp.broadcast_to(jnp.arange(chunks * R)[None] < T, (B, chunks * R))
    pad = lambda a: jnp.pad(jnp.asarray(a), ((0, 0), (0, chunks * R - T)))
    by_chunk = lambda a: a.reshape(B, chunks, R).swapaxes(0, 1)
    marks = jnp.concatenate([facts.any(axis=-1, keepdims=True), facts], axis=-1).astype(model.config.dtype)

    def one_chunk(buffer, chunk):
        tokens, asked, valid = chunk
        hidden, entries, queries = decoder.extend(model, Inputs(tokens, valid), buffer, queries=R)
        assert queries is not None
        best = jnp.argmax(decoder.unembed(model, hidden), axis=-1).astype(jnp.int32)
        found = _masses(buffer, entries, queries, marks, asked)
        # The newest queries of a whole chunk are its last ones; behind a padded one nothing is measured.
        wanted = queries_wanted(cache, R)
        newest = queries[:, :, R - wanted :] if wanted else None
        return take_in(buffer, entries, valid, newest, prompt=False), (*found, best)

    chunked = (by_chunk(pad(tokens)), by_chunk(pad(asked)), by_chunk(valid))
    _, found = jax.lax.scan(one_chunk, empty(model.config, cache, B), chunked)
    return Measured(*(a.swapaxes(0, 1).reshape(B, chunks * R, *a.shape[3:])[:, :T] for a in found))


def _masses(
    buffer: Buffer,
    new: Entries,
    queries: Float[Array, "B L T N H"],
    marks: Float[Array, "B all any_and_facts"],
    asked: Int[Array, "B T"],
) -> tuple[Float[Array, "B T L N"], ...]:
    """The masses of `Measured` for new tokens, from their queries, over the buffer and themselves.

    Attention over 0 and 1 in place of values is the share of attention on the ones, by the very operations of
    `decoder.extend`. With queries of 0 it is the share of the tokens seen, and the log-sum-exp is the log of their
    number.
    """
    _, L, T, _, H = queries.shape
    # Values are H wide, so marks go through attention so many at a time.
    blocks = -(-marks.shape[-1] // H)
    marks = jnp.pad(marks, ((0, 0), (0, 0), (0, blocks * H - marks.shape[-1])))
    at = lambda pos: jnp.take_along_axis(marks, jnp.clip(pos, 0, marks.shape[1] - 1)[..., None], axis=1)
    pos = buffer.seen[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    pairs = [jnp.split(a, blocks, axis=-1) for a in (at(buffer.pool.pos), at(pos))]

    def of_layer(scanned):
        q, k, index, window = scanned
        k = k.swapaxes(1, 2)

        def attended(q, pool_v, v):
            held = buffer._replace(pool=buffer.pool._replace(v=pool_v))
            every_head = jnp.broadcast_to(v[:, :, None], k.shape)
            return ops.merge([attend(held, q, index, "heads"), ops.causal_attention(q, k, every_head, window)])

        def share(q):
            """Attention on the fact asked for and on any fact, and the log-sum-exp of the logits."""
            parts = [attended(q, pool, v) for pool, v in zip(*pairs, strict=True)]
            out = jnp.concatenate([part.out for part in parts], axis=-1)
            return jnp.take_along_axis(out, asked[:, :, None, None] + 1, axis=-1)[..., 0], out[..., 0], parts[0].lse

        on_asked, on_any, _ = share(q)
        useful, _, log_seen = share(jnp.zeros_like(q))
        seen = jnp.exp(log_seen)
        return on_asked, on_any, useful * seen, seen

    by_layer = lambda a: a.swapaxes(0, 1)
    found = jax.lax.map(of_layer, (by_layer(queries), by_layer(new.k), jnp.arange(L), window_sizes(buffer.windows)))
    return tuple(jnp.moveaxis(a, 0, 2) for a in found)

"""Long text as rows of tokens, scored by how well each token is predicted: perplexity, and bits per byte.

Tokens of two models cover different stretches of text, so perplexity per token compares caches of one model only. Bits
per byte compares models too: every token here comes with the bytes of text that it covers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retention_jax.data import sources
from retention_jax.text.tokenizer import Tokenizer


class Tokens(NamedTuple):
    """A text under a tokenizer."""

    ids: Int[np.ndarray, " T"]
    ends: Int[np.ndarray, " T"]  # UTF-8 bytes of the text up to and with each token; never falls


class Rows(NamedTuple):
    """Consecutive rows of a text."""

    tokens: Int[np.ndarray, "n length"]
    num_bytes: Int[np.ndarray, "n length"]  # UTF-8 bytes of text that each token covers


def by_bytes(text: str) -> Tokens:
    """A token for every byte, byte + 1, as models of `configs/text.py` read text."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1
    return Tokens(ids, np.arange(1, len(ids) + 1))


def by_tokenizer(tokenizer: Tokenizer) -> Callable[[str], Tokens]:
    """How a checkpoint's tokenizer reads text, without a beginning-of-sequence token.

    Of a character that several tokens share, the first covers all bytes. Space that a tokenizer does not count to a
    token, as those of GPT's kind do, is covered by the next.
    """

    def encode(text: str) -> Tokens:
        encoding = tokenizer.encoding(text)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        last = np.array([stop for _, stop in encoding.offsets], np.int64)
        return Tokens(np.array(encoding.ids, np.int32), bytes_before[np.maximum.accumulate(last)])

    return encode


def rows(source: str, encode: Callable[[str], Tokens], *, length: int, limit: int | None) -> Rows:
    """The first rows of a text, at most `limit`; a remainder shorter than a row is left out.

    Args:
      source: as `sources.text` reads it.
      encode: `by_bytes`, or `by_tokenizer` of a tokenizer.
      length: tokens of a row.
      limit: rows; None for all.

    Raises:
      ValueError: when length or limit is not positive, the text is shorter than a row, and as `sources.text` does.
    """
    if length < 1 or (limit is not None and limit < 1):
        raise ValueError(f"length and limit must be at least 1, got length={length} and limit={limit}")
    ids, ends = encode(sources.text(source))
    count = min(len(ids) // length, limit or len(ids))
    if not count:
        raise ValueError(f"{source}: has {len(ids)} tokens; one row of length={length} is needed")
    used = slice(count * length)
    return Rows(ids[used].reshape(count, length), np.diff(ends[used], prepend=0).reshape(count, length))


def bits_per_byte(log_prob: Float[np.ndarray, "n length_less_1"], num_bytes: Int[np.ndarray, "n length"]) -> float:
    """-log2 of the rows' probability for each byte of their text. The first token of a row is given, not predicted.

    Args:
      log_prob: natural logs of the probabilities of the second token and those behind it.
      num_bytes: that the rows' tokens cover.
    """
    return float(-np.sum(log_prob, dtype=np.float64) / np.log(2) / num_bytes[:, 1:].sum())


def perplexity(log_prob: Float[np.ndarray, "n length_less_1"]) -> float:
    """exp(-mean log probability) of the predicted tokens, whose natural logs are given."""
    return float(np.exp(-np.mean(log_prob, dtype=np.float64)))

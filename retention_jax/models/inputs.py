"""What a model reads: tokens now, and what stands beside them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from retention_jax.runtime.arrays import AnyArray


class Inputs(NamedTuple):
    """New tokens of B rows, real ones first in each row.

    Everything that reads tokens on top of a buffer takes this one value. Positions for RoPE and the features of
    pictures will be further fields: then only the decoder and whoever makes the value have to know of them.
    """

    tokens: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]  # which tokens are real; the others are padding


def padded(rows: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B width"]:
    """Token ids of all rows in one array, zeros behind each row's own."""
    tokens = np.zeros((len(rows), width), np.int32)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return tokens


def chunk_of(tokens: Int[AnyArray, "B T"], lengths: Int[AnyArray, " B"], start: int, size: int) -> Inputs:
    """Tokens `start` up to `start + size` of padded rows, with padding where the rows or the array end."""
    part = np.asarray(tokens)[:, start : start + size]
    part = np.pad(part, ((0, 0), (0, size - part.shape[1]))).astype(np.int32)
    return Inputs(part, np.arange(start, start + size)[None] < np.asarray(lengths)[:, None])

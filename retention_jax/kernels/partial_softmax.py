"""Attention over some of the keys, and how several such parts become attention over all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """A softmax over some of the keys, at least float32. Where a query has no key, `out` is 0 and `lse` is -inf."""

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]  # log-sum-exp of the logits, natural


def merge(parts: Sequence[Partial]) -> Partial:
    """The softmax over the keys of all parts, which must be disjoint."""
    lse = jax.nn.logsumexp(jnp.stack([p.lse for p in parts]), axis=0)
    # A query without any key: every lse is -inf, and the shares must be 0, not exp(-inf + inf).
    share = lambda p: jnp.exp(p.lse - jnp.where(lse == -jnp.inf, 0.0, lse))[..., None]
    return Partial(sum((p.out * share(p) for p in parts), jnp.zeros_like(parts[0].out)), lse)

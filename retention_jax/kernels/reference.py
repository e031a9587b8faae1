"""What every operation of the package computes, in plain jnp and in one piece: T x T, easy to read, slow on purpose.

Kernels are tested against these functions, and these functions against numbers worked by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def _age(length: int) -> Int[Array, "T T"]:
    """`age[t, i] = t - i`, in tokens."""
    index = jnp.arange(length, dtype=jnp.int32)
    return index[:, None] - index[None, :]


def _visible(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether token t may look at token i: not later, and in the same document."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & (_age(segment_ids.shape[1]) >= 0)[None]


def _decay(log_beta: Float[Array, "B heads T"]) -> Float[Array, "B heads T T"]:
    """`(t - i) * log_beta_i`, what is left of entry i at token t, as a logarithm; only for i <= t."""
    age = _age(log_beta.shape[-1])[None, None]
    # An entry is whole when it is made, even with log_beta = -inf, where the product is nan.
    return jnp.where(age > 0, age.astype(log_beta.dtype) * log_beta[:, :, None, :], 0.0)


def retention_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents, in which every key fades with age (arXiv 2512.03324).

    `logit[t, i] = q_t . k_i * H^-0.5 + (t - i) * log_beta_i`; query head n reads key/value head `n // (N / K)`.
    `log_beta <= 0` is the log of what is kept per token: 0 is ordinary attention, -inf hides a key from all but its own
    token. Tokens see each other where `segment_ids` are equal and, with a `window`, less than that many tokens apart.
    Sums are in float32 or wider; the result has q's dtype.

    Raises:
      ValueError: if N is not a multiple of K.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    if N % K:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {N} and {K}")
    out_dtype, dtype = q.dtype, np.promote_types(q.dtype, np.float32)
    q, k, v, log_beta = (x.astype(dtype) for x in (q, k, v, log_beta))
    logits = jnp.einsum("btkgh,bikh->bkgti", q.reshape(B, T, K, N // K, H), k) * H**-0.5
    logits = logits + _decay(log_beta)[:, :, None]
    visible = _visible(segment_ids)
    if window is not None:
        visible = visible & (_age(T) < window)[None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgti,bikh->btkgh", weights, v)
    return out.reshape(B, T, N, H).astype(out_dtype)


def retention_mass(log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `S[t] = sum_{i <= t, same document} exp((t - i) log_beta_i)`.

    From 1 (the token itself, always whole) to the number of tokens of the document so far; the capacity loss compares
    it with the budget (arXiv 2605.09649).
    """
    decay = _decay(log_beta)
    return jnp.exp(jnp.where(_visible(segment_ids)[:, None], decay, -jnp.inf)).sum(-1)

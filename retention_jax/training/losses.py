"""What is minimised: next-token cross-entropy, distillation, and the capacity loss."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from retention_jax.config import LossConfig
from retention_jax.kernels import ops
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Visual
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray
from retention_jax.training import vocabulary


class Losses(NamedTuple):
    """The gate stage's loss and its terms, in nats a token but for `capacity`, which has no unit."""

    total: Float[Array, ""]
    kl: Float[Array, ""]
    ce: Float[Array, ""]
    capacity: Float[Array, ""]
    retained: Float[Array, "L K"]  # mean over tokens of S, the soft number of entries a head still holds


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def distillation(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    segment_ids: Int[AnyArray, "B T"],
    label_mask: Bool[AnyArray, "B T"],
    config: LossConfig,
    *,
    visual: Visual | None = None,
    remat: bool = False,
) -> Losses:
    """kl_weight * KL + ce_weight * CE + capacity_weight * capacity (arXiv 2605.09649).

    The student attends with the retention bias, the teacher is the same weights without it. Which positions KL and CE
    count is `label_weights`.

    Args:
      model: the decoder; gradients are meant for its gates.
      tokens: packed documents.
      segment_ids: equal within a document; 0 is padding.
      label_mask: True at tokens to be predicted.
      config: weights, budget and reductions.
      visual: the pictures among the tokens; student and teacher read the same features.
      remat: recompute each layer in the backward pass.
    """
    tokens, segment_ids, label_mask = jnp.asarray(tokens), jnp.asarray(segment_ids), jnp.asarray(label_mask)
    visual = jax.lax.stop_gradient(visual)
    student, log_beta = decoder.forward(model, tokens, segment_ids, visual, with_retention=True, remat=remat)
    teacher, _ = decoder.forward(model, tokens, segment_ids, visual, with_retention=False, remat=remat)

    def terms(head, target, student, teacher):
        log_p = jax.nn.log_softmax(decoder.logits(head, student), axis=-1)
        log_q = jax.nn.log_softmax(decoder.logits(head, teacher), axis=-1)
        first, second = (log_q, log_p) if config.kl == "forward" else (log_p, log_q)
        kl = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
        return jnp.stack([kl, -_picked(log_p, target)])

    kl, ce = vocabulary.weighted_sum(
        terms,
        sharding.gathered(decoder.output_head(model), "lm_head"),
        tokens,
        label_weights(segment_ids, label_mask, config),
        (student, jax.lax.stop_gradient(teacher)),
        config.vocab_block,
    )
    B, L, K, T = log_beta.shape
    mass = ops.retention_mass(sharding.constrain(log_beta.reshape(B, L * K, T), "scoring"), segment_ids)
    cap = capacity(mass, segment_ids, config)
    total = config.kl_weight * kl + config.ce_weight * ce + config.capacity_weight * cap
    real = (segment_ids > 0)[:, None]
    retained = jnp.sum(jnp.where(real, mass, 0), axis=(0, 2)) / jnp.maximum(real.sum(), 1)
    return Losses(total, kl, ce, cap, retained.reshape(L, K))


@functools.partial(jax.jit, static_argnames=("vocab_block", "remat"))
def next_token(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    segment_ids: Int[AnyArray, "B T"],
    label_mask: Bool[AnyArray, "B T"],
    *,
    vocab_block: int,
    remat: bool = False,
) -> Float[Array, ""]:
    """Mean cross-entropy of the labels in nats, with ordinary attention: the backbone stage's loss."""
    tokens, segment_ids, label_mask = jnp.asarray(tokens), jnp.asarray(segment_ids), jnp.asarray(label_mask)
    hidden, _ = decoder.forward(model, tokens, segment_ids, with_retention=False, remat=remat)

    def term(head, target, hidden):
        log_p = jax.nn.log_softmax(decoder.logits(head, hidden), axis=-1)
        return -_picked(log_p, target)[None]

    weights = _shares(_predicts_label(segment_ids, label_mask))[None]
    head = sharding.gathered(decoder.output_head(model), "lm_head")
    return vocabulary.weighted_sum(term, head, tokens, weights, (hidden,), vocab_block)[0]


def label_weights(
    segment_ids: Int[Array, "B T"], label_mask: Bool[Array, "B T"], config: LossConfig
) -> Float[Array, "2 B T"]:
    """How much the KL and the CE of each position count; each adds up to 1, or to 0 where there is no label.

    next: both are means over the positions whose next token is a label of the same document.

    released: what the released PyTorch code does with the same labels. KL is a mean over the labels themselves, not
    over the positions that predict them, and a document's last token predicts the next document's first. (Its packing
    also takes the label from each document's last token; that is up to `label_mask`.) With `released_block`, positions
    are cut into blocks of that many: a block's last position predicts nothing, and the CE is each block's mean weighted
    by the block's share of the labels.
    """
    if config.labels == "next":
        return jnp.stack([_shares(_predicts_label(segment_ids, label_mask))] * 2)
    B, T = label_mask.shape
    label = label_mask & (segment_ids > 0)
    block = config.released_block or T
    by_block = lambda a: jnp.pad(a, ((0, 0), (0, -T % block))).reshape(B, -1, block)
    labels = by_block(label)
    predicts = jnp.pad(labels[..., 1:], ((0, 0), (0, 0), (0, 1)))
    count = lambda a: jnp.sum(a, axis=(0, 2), keepdims=True).astype(jnp.float32)
    share = count(labels) / jnp.maximum(label.sum(), 1)
    ce = predicts * share / jnp.maximum(count(predicts), 1)
    return jnp.stack([_shares(label), ce.reshape(B, -1)[:, :T]])


def _predicts_label(segment_ids: Int[Array, "B T"], label_mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Positions whose next token is a label of the same document."""
    same_document = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return jnp.pad(label_mask[:, 1:] & same_document, ((0, 0), (0, 1)))


def _shares(counted: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return counted.astype(jnp.float32) / jnp.maximum(counted.sum(), 1)


def capacity(mass: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"], config: LossConfig) -> Float[Array, ""]:
    """How far the soft number of kept entries S exceeds the budget, as a share of what could exceed it.

    global: max(0, sum_heads S - M heads) / max(t heads - M heads, 1); local: max(0, S - M) / max(t - M, 1) for each
    head; t is the token's position in its document (arXiv 2605.09649; the local form is from arXiv 2512.03324). The
    mean runs over positive entries (released code; their number is a constant for the gradient) or over all real tokens
    (paper).
    """
    heads = mass.shape[1]
    t = decoder.document_positions(segment_ids)[:, None].astype(mass.dtype)
    if config.capacity == "global":
        mass, scale = mass.sum(axis=1, keepdims=True), heads
    else:
        scale = 1
    excess = (mass - config.budget * scale) / jnp.maximum((t - config.budget) * scale, 1)
    real = jnp.broadcast_to((segment_ids > 0)[:, None], excess.shape)
    positive = real & (excess > 0)
    counted = positive if config.capacity_mean == "positive" else real
    return jnp.sum(jnp.where(positive, excess, 0)) / jnp.maximum(counted.sum(), 1)


def _picked(log_p: Float[Array, "*axes V"], token: Int[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Each position's log-probability of its token. As a sum, so that nothing is gathered from a vocabulary that lies
    on several devices."""
    ids = jax.lax.broadcasted_iota(token.dtype, log_p.shape, log_p.ndim - 1)
    return jnp.sum(jnp.where(ids == token[..., None], log_p, 0), axis=-1)

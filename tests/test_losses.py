"""Losses against numbers worked by hand, and against float64 loops. `test_golden.py` has the released ones."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retention_jax.config import GateConfig, LossConfig
from retention_jax.models import decoder
from retention_jax.models.gate import GateParam
from retention_jax.training import losses

pytestmark = pytest.mark.one_version


def capacity(mass, segments, **changes):
    return float(
        losses.capacity(jnp.asarray(mass, jnp.float32), jnp.asarray(segments, jnp.int32), LossConfig(**changes))
    )


def test_capacity_by_hand():
    mass = [[[1.0, 2.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0]]]  # two heads, four tokens, M = 1
    segments = [[1, 1, 1, 1]]
    # global: sums 2 3 4 4, M heads = 2, t heads - M heads = -2 0 2 4 (at least 1): 0, 1, 2/2, 2/4
    assert capacity(mass, segments, budget=1) == pytest.approx((1 + 1 + 0.5) / 3)
    assert capacity(mass, segments, budget=1, capacity_mean="all") == pytest.approx(2.5 / 4)
    # local: head 0 exceeds by 0 1 2 2, over t - M = -1 0 1 2 (at least 1): 0, 1, 2, 1; head 1 never
    assert capacity(mass, segments, budget=1, capacity="local") == pytest.approx(4 / 3)
    assert capacity(mass, segments, budget=1, capacity="local", capacity_mean="all") == pytest.approx(4 / 8)
    # Positions restart with a document, and padding does not count.
    assert capacity(mass, [[1, 1, 2, 2]], budget=1) == pytest.approx((1 + 2 + 2) / 3)
    assert capacity(mass, [[1, 1, 0, 0]], budget=1) == pytest.approx(1.0)
    assert capacity(mass, segments, budget=4) == 0.0


@pytest.mark.parametrize("vocab_block, kind", ((1, "forward"), (7, "reverse"), (64, "forward"), (10_000, "forward")))
def test_distillation_terms_are_plain_means_over_labels(vocab_block, kind):
    model = helpers.tiny_model()
    tokens, rng = helpers.tokens_of(1, 2, 24), np.random.default_rng(2)
    segments = np.array([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4], np.int32)
    label_mask = rng.random((2, 24)) < 0.5
    config = LossConfig(budget=4, kl=kind, vocab_block=vocab_block)
    got = losses.distillation(model, tokens, segments, label_mask, config)

    logits = [
        np.asarray(decoder.unembed(model, decoder.forward(model, tokens, segments, with_retention=r)[0]), np.float64)
        for r in (True, False)
    ]
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    kl, ce = [], []
    for b in range(2):
        for t in range(23):
            if label_mask[b, t + 1] and segments[b, t] == segments[b, t + 1] > 0:
                first, second = (log_q, log_p) if kind == "forward" else (log_p, log_q)
                kl.append(np.sum(np.exp(first[b, t]) * (first[b, t] - second[b, t])))
                ce.append(-log_p[b, t, tokens[b, t + 1]])
    helpers.assert_close(got.kl, np.mean(kl))
    helpers.assert_close(got.ce, np.mean(ce))
    helpers.assert_close(got.total, 0.5 * np.mean(kl) + 0.5 * np.mean(ce) + float(got.capacity))


def test_no_labels_give_zero_not_nan():
    terms = losses.distillation(
        helpers.tiny_model(),
        helpers.tokens_of(0, 1, 8),
        np.ones((1, 8), np.int32),
        np.zeros((1, 8), bool),
        LossConfig(),
    )
    assert float(terms.kl) == float(terms.ce) == 0.0


def test_teacher_carries_no_gradient_and_backbone_is_not_needed():
    """Only the student's path moves the gates: with the bias off in both, KL has no gradient."""
    model = helpers.tiny_model(GateConfig(width=8, offset_init=40.0))  # sigmoid(40) is 1: student = teacher
    graphdef, gates, frozen = nnx.split(model, GateParam, ...)
    tokens, ones = helpers.tokens_of(3, 1, 16), np.ones((1, 16), np.int32)

    def loss(gates):
        return losses.distillation(
            nnx.merge(graphdef, gates, frozen), tokens, ones, ones == 1, LossConfig(ce_weight=0.0)
        ).kl

    assert float(jax.jit(loss)(gates)) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(gates))) < 1e-6


def by_hand(label_mask, segments, block):
    """What the released code counts: KL positions, and (position, weight) of the CE, as plain loops over one row."""
    labels = [t for t in range(len(label_mask)) if label_mask[t] and segments[t]]
    kl, ce = {t: 1 / len(labels) for t in labels}, {}
    for start in range(0, len(label_mask), block):
        inside = [t for t in labels if start <= t < start + block]
        targets = [t for t in inside if t > start]
        ce |= {t - 1: len(inside) / len(labels) / len(targets) for t in targets}
    return kl, ce


@pytest.mark.parametrize("block", (None, 2, 5, 12, 100))
def test_released_labels(block):
    rng = np.random.default_rng(block)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]], np.int32)
    label_mask = rng.random((1, 12)) < 0.6
    config = LossConfig(labels="released", released_block=block)
    got = losses.label_weights(jnp.asarray(segments), jnp.asarray(label_mask), config)
    for weights, want in zip(got[:, 0], by_hand(label_mask[0], segments[0], block or 12), strict=True):
        np.testing.assert_allclose(weights, [want.get(t, 0.0) for t in range(12)], rtol=1e-6)


def test_released_labels_of_two_rows_are_counted_together():
    ones = jnp.ones((2, 4), int)
    label_mask = jnp.array([[0, 1, 1, 0], [1, 1, 1, 1]], bool)
    got = losses.label_weights(ones, label_mask, LossConfig(labels="released"))
    np.testing.assert_allclose(got[0] * 6, label_mask, rtol=1e-6)
    np.testing.assert_allclose(got[1] * 5, [[1, 1, 0, 0], [1, 1, 1, 0]], rtol=1e-6)
    got = losses.label_weights(ones, label_mask, LossConfig(labels="released", released_block=2))
    # Labels 3 and 3; targets 2 in the first blocks (position 0 of each row), 1 in the second (position 2 of row 1).
    np.testing.assert_allclose(got[1], [[1 / 4, 0, 0, 0], [1 / 4, 0, 1 / 2, 0]], rtol=1e-6)


def test_config_reaches_every_term():
    """Each weight scales its own term and no other."""
    model, tokens = helpers.tiny_model(), helpers.tokens_of(5, 1, 20)
    args = (model, tokens, np.ones((1, 20), np.int32), np.ones((1, 20), bool))
    base = LossConfig(kl_weight=0.0, ce_weight=0.0, capacity_weight=0.0, budget=2)
    for weight, term in (("kl_weight", "kl"), ("ce_weight", "ce"), ("capacity_weight", "capacity")):
        got = losses.distillation(*args, dataclasses.replace(base, **{weight: 2.0}))
        assert float(got.total) == pytest.approx(2 * float(getattr(got, term))) != 0.0

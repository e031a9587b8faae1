"""Losses against numbers worked by hand, and against float64 loops. `test_golden.py` has the released ones."""

import contextlib
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
from retention_jax.parallel import sharding
from retention_jax.training import losses, vocabulary


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


def vocabulary_case(labels, B=2, T=300, seed=0):
    """Head, tokens, weights of two terms of which `labels` positions count, and two hidden states."""
    rng, V, D = np.random.default_rng(seed), 32, 8
    counted = np.zeros(B * T, bool)
    counted[rng.permutation(B * T)[:labels]] = True
    weights = (rng.random((2, B * T)) * counted).reshape(2, B, T)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return draw(V, D), tokens, jnp.asarray(weights, jnp.float32), (draw(B, T, D), draw(B, T, D))


def two_terms(head, target, student, teacher):
    log_p, log_q = (jax.nn.log_softmax(h @ head.T, axis=-1) for h in (student, teacher))
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    return jnp.stack([kl, -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]])


def everywhere(head, tokens, weights, hidden):
    """The sum with the logits of all positions at once."""
    return jnp.sum(two_terms(head, jnp.roll(tokens, -1, axis=1), *hidden) * weights, axis=(1, 2))


@pytest.mark.parametrize("labels, most", ((0, 64), (1, 64), (7, 1), (90, 64), (600, 64), (600, 10_000)))
@pytest.mark.parametrize("mesh", (None, dict(data=2, context=2, tensor=2), dict(context=8), dict(data=4)), ids=str)
def test_vocabulary_sum_and_its_gradients_are_those_of_all_logits(labels, most, mesh):
    """Also where the mesh divides neither rows (data=4) nor tokens (context=8)."""
    head, tokens, weights, hidden = vocabulary_case(labels)
    cotangent = jnp.array([1.5, -0.5])

    def run(operation):
        return jax.jit(lambda *x: (operation(*x), jax.grad(lambda *x: operation(*x) @ cotangent, (0, 1))(*x)))

    want = run(lambda head, hidden: everywhere(head, tokens, weights, hidden))(head, hidden)
    got = run(lambda head, hidden: vocabulary.weighted_sum(two_terms, head, tokens, weights, hidden, most))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(**mesh)):
        got = got(head, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        helpers.assert_close(a, b, 1e-6)


def blocks_run(labels, most, T, mesh=None):
    """Blocks whose terms are made, by one device, in a forward and a backward pass."""
    head, tokens, weights, hidden = vocabulary_case(labels, T=T)
    run = []

    def counting(*args):
        jax.debug.callback(lambda: run.append(1))
        return two_terms(*args)

    total = lambda *x: vocabulary.weighted_sum(counting, x[0], tokens, weights, x[1], most).sum()
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(**mesh)):
        jax.block_until_ready(jax.jit(jax.value_and_grad(total, (0, 1)))(head, hidden))
        jax.effects_barrier()
    return len(run)


def test_vocabulary_blocks_without_a_label_are_skipped_in_both_passes():
    """2,048 positions of a device are 16 blocks of 128; a block is made once forward, and once more backward."""
    assert vocabulary.block_size(2048, 4096) == 128
    for labels, blocks in ((0, 0), (1, 1), (102, 1), (129, 2), (1024, 8), (2048, 16)):
        assert blocks_run(labels, 4096, 1024) == 2 * blocks
    # A smaller limit makes smaller blocks: 102 of 64 positions are two.
    assert blocks_run(102, 64, 1024) == 4


def test_vocabulary_blocks_are_what_the_device_with_most_labels_needs():
    """Eight devices have 150 positions each in blocks of 32; together they run as many as the fullest of them needs."""
    head, tokens, weights, hidden = vocabulary_case(90, T=600)
    by_device = np.count_nonzero(np.asarray(weights).any(axis=0).reshape(2, 4, 150), axis=-1)
    with jax.set_mesh(sharding.make_mesh(data=2, context=4)):
        blocks = jax.jit(vocabulary._compact, static_argnums=3)(
            jnp.moveaxis(weights, 0, -1), jnp.roll(tokens, -1, axis=1), hidden, 4
        )
    assert blocks.occupied == -(-by_device.max() // 4) < 150 // 4
    # First what counts, in its order, on each device.
    got = np.asarray(blocks.weights).transpose(1, 2, 0, 3, 4).reshape(2, 4, -1, 2)[:, :, :150]
    given = np.moveaxis(np.asarray(weights), 0, -1).reshape(2, 4, 150, 2)
    for g, w in zip(got.reshape(8, 150, 2), given.reshape(8, 150, 2), strict=True):
        np.testing.assert_array_equal(g, np.concatenate([w[w.any(axis=-1)], w[~w.any(axis=-1)]]))


def test_a_gradient_costs_only_where_it_is_asked_for():
    """Matrix products of the backward loop: two logits, and one for each hidden state and each use of the head."""
    head, tokens, weights, hidden = vocabulary_case(90)

    def products(argnums):
        total = lambda *x: vocabulary.weighted_sum(two_terms, x[0], tokens, weights, x[1:], 64).sum()
        return jax.jit(jax.grad(total, argnums)).lower(head, *hidden).as_text().count("stablehlo.dot_general")

    assert [products(argnums) for argnums in ((1,), (1, 2), (0,), (0, 1, 2))] == [3, 4, 4, 6]

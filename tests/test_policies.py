"""Eviction scores against numbers worked by hand and float64 sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hashed

from retention_jax.config import CacheConfig
from retention_jax.policies import scores, table


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def retention(log_beta, pos, seen, horizon):
    """One row."""
    score = scores.retention(
        jnp.asarray([log_beta], jnp.float32), jnp.asarray([pos], jnp.int32), jnp.asarray([seen], jnp.int32), horizon
    )
    return np.asarray(score)[0]


def test_by_hand():
    # After 10 tokens the newest, position 9, has age 10 + 1 - 9 = 2 and the first has age 11.
    np.testing.assert_array_equal(
        retention([-0.5, -0.5, -0.25, 0.0, -math.inf], [9, 0, 4, 0, 9], 10, horizon=1),
        [-1.0, -5.5, -1.75, 0.0, -math.inf],
    )
    # beta = 1/2, horizon 2, newest token: log(2^-3 + 2^-4) = log(3/16).
    np.testing.assert_allclose(retention([-math.log(2)], [9], 10, horizon=2), [math.log(3 / 16)], rtol=1e-6)


def test_every_row_counts_its_own_tokens():
    score = scores.retention(jnp.full((2, 1), -1.0), jnp.array([[3], [3]]), jnp.array([4, 8]), 1)
    np.testing.assert_array_equal(score, [[-2.0], [-6.0]])


@pytest.mark.parametrize("horizon", (2, 16, 1000))
def test_horizon_is_the_log_of_a_sum(horizon):
    log_beta = -np.logspace(-7, 1, 40).astype(np.float32)
    seen, pos = 50, np.arange(40)
    age = seen + 1 - pos
    steps = np.arange(1, horizon + 1, dtype=np.float64)
    exponents = (age[:, None] + steps) * log_beta[:, None].astype(np.float64)
    top = exponents.max(axis=1)
    want = top + np.log(np.exp(exponents - top[:, None]).sum(axis=1))
    np.testing.assert_allclose(retention(log_beta, pos, seen, horizon), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("horizon", (2, 16, 100_000))
@pytest.mark.parametrize("log_beta", (0.0, -0.0, -1e-30, -float(np.finfo(np.float32).tiny), -1e-12))
def test_horizon_of_an_entry_that_is_never_forgotten(horizon, log_beta):
    np.testing.assert_allclose(retention([log_beta], [0], 1000, horizon), [math.log(horizon)], rtol=1e-6)


@pytest.mark.parametrize("log_beta", (-100.0, -1e30, -math.inf))
def test_horizon_of_an_entry_that_is_forgotten_at_once(log_beta):
    np.testing.assert_allclose(retention([log_beta], [9], 10, 16), [3 * np.float32(log_beta)], rtol=1e-6)


def test_streaming_keeps_sinks_then_the_newest():
    score = np.asarray(scores.streaming(jnp.arange(40, dtype=jnp.int32)[None]))[0]
    assert sorted(range(40), key=lambda i: -score[i])[:7] == [0, 1, 2, 3, 39, 38, 37]
    assert np.all(np.diff(score[4:]) > 0) and np.all(score[:4] == score[0]) and np.isfinite(score).all()


def test_random_is_uniform():
    pos, head = np.divmod(np.arange(40_000, dtype=np.int32), 8)
    score = np.asarray(scores.random(jnp.asarray(pos)[None], jnp.asarray(head)[None], 3))[0]
    assert score.min() >= 0 and score.max() < 1
    # Each of 16 bins holds 2500 +- 48 (one standard deviation), and neighbours are uncorrelated to 1 / sqrt(40000);
    # five of either are allowed.
    counts = np.histogram(score, 16, (0, 1))[0]
    np.testing.assert_allclose(counts, 2500, atol=5 * 48)
    for step in (1, 8):  # the next head, the next token
        assert abs(np.corrcoef(score[:-step], score[step:])[0, 1]) < 5 / 200


def test_random_depends_on_seed_position_and_head_only():
    pos, head = jnp.array([[5, 5, 6, 5]]), jnp.array([[0, 1, 0, 0]])
    one, two = (np.asarray(scores.random(pos, head, seed))[0] for seed in (0, 1))
    assert len({*one[:3], *two[:3]}) == 6 and one[0] == one[3]
    np.testing.assert_array_equal(
        one, [np.float32(hashed(int(p), int(h), 0)) for p, h in zip(pos[0], head[0], strict=True)]
    )


@pytest.mark.parametrize("policy", ("retention", "streaming", "random"))
def test_the_configured_policy_scores(policy):
    log_beta, pos = jnp.array([[-0.5, -1.0]]), jnp.array([[7, 2]])
    head, seen = jnp.array([[0, 3]]), jnp.array([9])
    cfg = CacheConfig(budget=1, policy=policy, seed=5 if policy == "random" else 0)
    got, _ = cfg.row.score(cfg.options, table.Everything(log_beta, pos, head, seen, None))
    want = {
        "retention": lambda: scores.retention(log_beta, pos, seen, 1),
        "streaming": lambda: scores.streaming(pos),
        "random": lambda: scores.random(pos, head, 5),
    }[policy]()
    np.testing.assert_array_equal(got, want)

"""Sampling: the filters against those of transformers, and draws that follow the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention_jax.generation import sampling
from retention_jax.generation.sampling import sample, settings

pytestmark = pytest.mark.slow

STEP = jnp.int32(2)


def rows(count):
    return jnp.arange(count)


@pytest.mark.parametrize("temperature", (0.6, 1.0, 2.0))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ),
)
def test_the_same_tokens_stay_as_in_transformers(temperature, options):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("transformers.generation.logits_process")
    logits = (3 * np.random.default_rng(0).normal(size=(4, 100))).astype(np.float32)
    want = torch.tensor(logits)
    for name, make in (
        ("temperature", library.TemperatureLogitsWarper),
        ("top_k", library.TopKLogitsWarper),
        ("top_p", library.TopPLogitsWarper),
        ("min_p", library.MinPLogitsWarper),
    ):
        given = {"temperature": temperature, **options}
        if name in given:
            want = make(given[name])(None, want)
    got = sampling.keep(jnp.asarray(logits), settings(temperature, **options))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_ties_stay_together():
    logits = jnp.log(jnp.array([[0.3, 0.3, 0.2, 0.1, 0.1]]))
    stays = lambda **options: np.isfinite(sampling.keep(logits, settings(1.0, **options)))[0].tolist()
    assert stays(top_k=1) == [True, True, False, False, False]
    assert stays(top_k=4) == [True] * 5
    assert stays(top_p=0.2) == [True, True, False, False, False]
    assert stays(top_p=0.7) == [True, True, True, False, False]
    assert stays(top_k=3, top_p=0.7) == [True, True, False, False, False]  # 0.6 of 0.8 is 0.75


def test_a_rows_draw_is_its_own():
    # From one set of logits, rows and steps draw differently; a row's draws do not depend on how many rows there are.
    logits, key, how = jnp.zeros((8, 1000)), jax.random.key(0), settings(1.0)
    draws = np.array([sample(logits, key, rows(8), jnp.int32(step), how) for step in range(4)])
    assert len(np.unique(draws)) > 24
    np.testing.assert_array_equal(sample(logits[:3], key, rows(3), STEP, how), draws[2, :3])
    np.testing.assert_array_equal(sample(logits[:2], key, jnp.array([7, 1]), STEP, how), draws[2, [7, 1]])


@pytest.mark.parametrize(
    "options, want",
    (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 2.0}, None),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
    ),
)
def test_draws_follow_the_distribution(options, want):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    if want is None:
        want = p**0.5 / (p**0.5).sum()
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (4000, 4))
    drawn = np.asarray(sample(logits, jax.random.key(1), rows(4000), STEP, settings(**{"temperature": 1.0, **options})))
    got = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(got, want, atol=5 * 0.008)  # five standard deviations
    assert (got[np.asarray(want) == 0] == 0).all()


def test_temperature_zero_is_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(3), (5, 50))
    for how in (settings(), settings(top_k=3, top_p=0.5, min_p=0.3), settings(1.0, top_k=1), settings(1e-5)):
        np.testing.assert_array_equal(sample(logits, jax.random.key(0), rows(5), STEP, how), jnp.argmax(logits, -1))


def test_settings_are_checked_together():
    with pytest.raises(
        ValueError, match="temperature .* got -1.0; top_k .* got -2; top_p .* got 1.5; min_p .* got -0.1"
    ):
        settings(-1.0, -2, 1.5, -0.1)

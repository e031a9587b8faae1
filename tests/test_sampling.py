"""Sampling: the filters against those of transformers, and draws that follow the distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention_jax.generation import sampling
from retention_jax.generation.sampling import sample, settings


def steps(count, step=2):
    return jnp.full(count, step)


def alike(count, *given, **options):
    """The same settings for so many rows."""
    return settings(*given, row_ids=range(count), **options)


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
    got = sampling.keep(jnp.asarray(logits), alike(4, temperature, **options))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_ties_stay_together():
    logits = jnp.log(jnp.array([[0.3, 0.3, 0.2, 0.1, 0.1]]))
    stays = lambda **options: np.isfinite(sampling.keep(logits, alike(1, 1.0, **options)))[0].tolist()
    assert stays(top_k=1) == [True, True, False, False, False]
    assert stays(top_k=4) == [True] * 5
    assert stays(top_p=0.2) == [True, True, False, False, False]
    assert stays(top_p=0.7) == [True, True, True, False, False]
    assert stays(top_k=3, top_p=0.7) == [True, True, False, False, False]  # 0.6 of 0.8 is 0.75


def test_a_rows_draw_is_its_own():
    # From one set of logits, rows and steps draw differently; a row's draws do not depend on how many rows there are.
    logits = jnp.zeros((8, 1000))
    draws = np.array([sample(logits, steps(8, step), alike(8, 1.0)) for step in range(4)])
    assert len(np.unique(draws)) > 24
    np.testing.assert_array_equal(sample(logits[:3], steps(3), alike(3, 1.0)), draws[2, :3])
    np.testing.assert_array_equal(
        sample(logits[:2], jnp.array([2, 1]), settings(1.0, row_ids=[7, 1])), draws[[2, 1], [7, 1]]
    )


def test_a_row_has_its_own_seed():
    """The key of a draw is fold_in(fold_in(key(seed), row_id), step), as it was when a batch had one seed."""
    logits, seeds, ids = (
        jax.random.normal(jax.random.key(5), (6, 1000)),
        [0, 7, 7, -1, 2**40 + 3, 2**31],
        [0, 4, 5, 2, 2, 9],
    )
    got = sample(logits, steps(6, 3), settings(1.0, seed=seeds, row_ids=ids))
    for row, (seed, row_id) in enumerate(zip(seeds, ids, strict=True)):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row_id), 3)
        assert got[row] == jax.random.categorical(key, logits[row])


def test_rows_of_all_settings_draw_as_they_do_alone():
    logits = 2 * jax.random.normal(jax.random.key(6), (7, 300))
    each: dict[str, Any] = dict(
        temperature=[0.0, 1.0, 0.7, 1.5, 1.0, 0.0, 2.0],
        top_k=[3, 0, 5, 0, 1000, 0, 2**31 - 1],
        top_p=[0.5, 1.0, 1.0, 0.8, 1.0, 1.0, 0.3],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.2, 0.5, 0.0],
        seed=[1, 1, 2, 3, 4, 5, 6],
    )
    together = settings(**each, row_ids=range(7))
    for step in range(8):
        got = sample(logits, steps(7, step), together)
        for row in range(7):
            one = settings(**{name: values[row] for name, values in each.items()}, row_ids=[row])
            assert got[row] == sample(logits[row : row + 1], steps(1, step), one)[0]
        assert got[0] == jnp.argmax(logits[0]) and got[5] == jnp.argmax(logits[5])


@pytest.mark.parametrize("temperature", (0.0, 1.0, [0.0, 1.0, 0.0, 1.0]))
def test_a_row_without_finite_logits_says_so(temperature):
    logits = jnp.ones((4, 9)).at[1, 3].set(jnp.nan).at[2].set(jnp.nan)
    got = sample(logits, steps(4), alike(4, temperature, top_k=2)).tolist()
    assert got[1:3] == [sampling.NOT_FINITE] * 2 and min(got[0], got[3]) >= 0
    assert sample(logits.at[0, 0].set(jnp.inf), steps(4), alike(4, temperature))[0] == sampling.NOT_FINITE
    some_left_out = jnp.full((4, 9), -jnp.inf).at[:, 5].set(-2.0)
    assert sample(some_left_out, steps(4), alike(4, temperature, top_p=0.5)).tolist() == [5] * 4


def test_greedy_rows_sort_and_draw_nothing():
    """All sorts and random bits stand in the branch of a conditional that greedy rows do not take."""
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((2, 9)), steps(2), alike(2))
    outside = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert "cond" in outside and not {"sort", "random_bits", "random_fold_in"} & set(outside)
    assert "sort" in str(jaxpr) and "random_bits" in str(jaxpr)


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
    drawn = np.asarray(sample(logits, steps(4000), alike(4000, seed=1, **{"temperature": 1.0, **options})))
    got = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(got, want, atol=5 * 0.008)  # five standard deviations
    assert (got[np.asarray(want) == 0] == 0).all()


def test_temperature_zero_is_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(3), (5, 50))
    for options in ({}, dict(top_k=3, top_p=0.5, min_p=0.3), dict(temperature=1.0, top_k=1), dict(temperature=1e-5)):
        np.testing.assert_array_equal(sample(logits, steps(5), alike(5, **options)), jnp.argmax(logits, -1))


def test_settings_are_checked_together():
    with pytest.raises(
        ValueError, match="temperature .* got -1.0; top_k .* got -2; top_p .* got 1.5; min_p .* got -0.1"
    ):
        settings(-1.0, -2, 1.5, -0.1)
    with pytest.raises(ValueError) as refused:
        settings([0.5, -1.0, float("nan")], [1, 2**31, 2.5], 1.0, [0.1, 0.2], seed=2**63, row_ids=[0, 2**31, 2])
    assert str(refused.value).split("; ") == [
        "temperature must be at least 0, got -1.0 for row 1",
        "temperature must be at least 0, got nan for row 2",
        f"top_k must be a whole number from 0 (keeps all tokens) to {2**31 - 1}, got {2**31} for row 1",
        f"top_k must be a whole number from 0 (keeps all tokens) to {2**31 - 1}, got 2.5 for row 2",
        "min_p must be 3 numbers, got 2",
        f"seed must be a whole number of 64 bits, got {2**63}",
        f"row_ids must be whole numbers of 32 bits, got {2**31} for row 1",
    ]

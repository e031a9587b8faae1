"""Dilution: what the statements say of any logits and of any ages."""

import jax.numpy as jnp
import numpy as np
import pytest

from retention_jax.dilution import statements
from retention_jax.policies import scores


def softmax(logits):
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


@pytest.fixture(params=range(20))
def attention(request):
    """Logits of some useful tokens and some distractors, their number, and the dilution: any case."""
    rng = np.random.default_rng(request.param)
    u, m = rng.integers(1, 6), rng.integers(1, 40)
    logits = rng.normal(0, rng.uniform(0.1, 3), u + m)
    logits[:u] += rng.uniform(-2, 6)
    return logits, int(u), int(m), float(softmax(logits)[u:].sum())


def arrays(*numbers):
    return [np.atleast_1d(np.asarray(x, np.float64)) for x in numbers]


def test_near_ties_force_dilution(attention):
    logits, u, m, diluted = attention
    gap = logits[:u].max() - logits[u:].min()
    assert diluted >= statements.least_dilution(*arrays(u, m, gap)) - 1e-12
    tied = np.concatenate([np.full(u, 0.7), np.full(m, 0.7 - gap)])  # the equality case
    assert softmax(tied)[u:].sum() == pytest.approx(statements.least_dilution(*arrays(u, m, gap)))


def test_more_distractors_force_all_attention_off():
    bound = statements.least_dilution(*arrays(np.full(4, 6), [18, 180, 1800, 18e6], np.ones(4)))
    assert np.all(np.diff(bound) > 0)
    assert bound[0] == pytest.approx(18 / (18 + 6 * np.e)) and bound[-1] > 1 - 1e-6


def test_margin_is_what_a_dilution_needs(attention):
    logits, u, m, diluted = attention
    margin = np.log(np.exp(logits[:u]).mean() / np.exp(logits[u:]).mean())
    assert statements.needed_margin(*arrays(u, m, diluted)) == pytest.approx(margin)
    assert m / (m + u * np.exp(margin)) == pytest.approx(diluted)  # the other way round
    grown = statements.needed_margin(*arrays(u, 8 * m, diluted)) - margin
    assert grown == pytest.approx(np.log(8)), "for the same dilution the margin grows like the log of the crowd"


@pytest.mark.parametrize("chance_useful, chance_rest", [(0.9, 0.3), (0.3, 0.9), (0.6, 0.6)])
def test_what_eviction_leaves(attention, chance_useful, chance_rest):
    logits, u, m, diluted = attention
    kept = np.random.default_rng(m).random(u + m) < np.repeat([chance_useful, chance_rest], [u, m])
    kept[[0, -1]] = True  # something of both
    a = softmax(logits)
    useful, rest = a[:u][kept[:u]].sum() / a[:u].sum(), a[u:][kept[u:]].sum() / a[u:].sum()
    after = softmax(logits[kept])[kept[:u].sum() :].sum()
    assert statements.dilution_after(*arrays(diluted, useful, rest)) == pytest.approx(after)
    if useful != pytest.approx(rest):
        assert (after < diluted) == (useful > rest)
    again = statements.dilution_after(*arrays(after, 1 / useful, 1 / rest))  # keeping the inverse shares undoes it
    assert again == pytest.approx(diluted)


def test_ends_of_eviction():
    assert statements.dilution_after(*arrays(0.75, 1, 0)) == 0  # all distractors evicted
    assert statements.dilution_after(*arrays(0.75, 0, 1)) == 1  # all useful tokens evicted
    assert statements.dilution_after(*arrays(0.75, 1, 1 / 3)) == pytest.approx(0.5)
    assert statements.dilution_after(*arrays(0.75, 0.5, 0.5)) == pytest.approx(0.75)


@pytest.mark.parametrize("beta, age, horizon", [(0.5, 2, 1), (0.9, 3, 7), (0.999, 40, 200), (0.02, 1, 5)])
def test_use_that_ends_with_constant_hazard_is_the_retention_score(beta, age, horizon):
    lasts = np.cumprod(np.full(age + horizon, beta))  # to age 1, 2, ...: it ended at no step until then
    assert statements.expected_use(*arrays(beta, age, horizon)) == pytest.approx(lasts[age:].sum())
    here, pos, seen = jnp.log(jnp.array([[beta]])), jnp.zeros((1, 1), jnp.int32), jnp.array([age - 1], jnp.int32)
    scored = lasts[age:].sum() if horizon > 1 else lasts[age - 1]
    assert np.exp(scores.retention(here, pos, seen, horizon)) == pytest.approx(scored, rel=1e-4)


def test_only_constant_hazard_is_memoryless():
    def forgets(lasts):  # P(age a + b | age a) = P(age b), ages from 0
        return all(np.allclose(lasts[a:] / lasts[a], lasts[: len(lasts) - a]) for a in range(len(lasts)))

    ages = np.arange(30)
    assert forgets(0.9**ages)
    hazards = np.random.default_rng(0).uniform(0, 0.3, (20, 29))
    assert not any(forgets(np.cumprod([1, *1 - row])) for row in hazards)
    assert not forgets(1 / (1 + ages)) and not forgets(np.maximum(1 - ages / 29, 1e-3))


def test_looking_ahead_lets_the_old_overtake_the_fresh():
    horizons = np.array([1.0, 2, 8, 64, 1e4])
    ages = statements.age_of_equal_use(np.full(5, 0.99), np.full(5, 0.8), horizons)
    assert ages[0] == pytest.approx(np.log(0.8) / np.log(0.99) - 1)  # the next step's order: beta^(age + 1)
    assert np.all(np.diff(ages) > 0)
    assert ages[-1] == pytest.approx(np.log(0.8 / 0.2 / (0.99 / 0.01)) / np.log(0.99), rel=1e-6)
    use = lambda beta, age, n: statements.expected_use(*arrays(beta, age, n))
    for n, age in zip(horizons, ages, strict=True):
        assert use(0.99, age, n) == pytest.approx(use(0.8, 0, n))
        assert use(0.99, age - 1, n) > use(0.8, 0, n) > use(0.99, age + 1, n)
    # The cache's own score evicts the token of age 100 first at horizon 1, the fresh one at 64.
    log_beta, pos = jnp.log(jnp.array([[0.99, 0.8]])), jnp.array([[0, 100]], jnp.int32)
    one, many = (scores.retention(log_beta, pos, jnp.array([101], jnp.int32), n)[0] for n in (1, 64))
    assert one[0] < one[1] and many[0] > many[1] and ages[0] < 100 < ages[3]
    # With equal betas looking ahead changes nothing, and g lies between 1 and n.
    assert statements.age_of_equal_use(*arrays(0.9, 0.9, 50)) == pytest.approx(0, abs=1e-9)
    gain = use(0.99, 0, horizons) / 0.99
    assert np.all((1 - 1e-9 <= gain) & (gain <= horizons + 1e-9))


def test_statements_are_no_quotations():
    all_three = (statements.least_dilution, statements.needed_margin, statements.dilution_after)
    for statement in (*all_three, statements.expected_use, statements.age_of_equal_use):
        assert "Reconstructed by us" in (statement.__doc__ or "")

"""Eviction scores against numbers worked by hand and float64 sums."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hashed, tiny_model

import retention_jax as rj
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


# Policies that the table does not have: one of every scope and way to score. What each must keep of 20 tokens is known.


def alternating(options, x):
    """Even positions before odd ones, newer ones first. Needs nothing."""
    return jnp.where(x.pos % 2 == 0, 1000, 0) + x.pos.astype(jnp.float32), x.stat


def by_prompt(options, x):
    """What was no prompt stays."""
    return -x.stat, x.stat


def oldest_in_layer(options, x):
    return -x.pos.astype(jnp.float32), x.stat


def attended(options, x):
    """H2O once more: all attention so far, and the newest tokens."""
    _, query_pos = x.asked()
    stat = x.stat + x.attention(query_pos).sum(axis=2).astype(jnp.float32)
    return jnp.where(x.newest(options.newest), jnp.inf, stat), stat


@pytest.fixture
def model():
    return tiny_model()


def added(monkeypatch, *args, **row) -> str:
    new = table.Policy("added", *args, **row)
    monkeypatch.setitem(table.POLICIES, new.name, new)
    jax.clear_caches()  # programs are kept by configuration, in which a policy is its name
    return new.name


def kept(model, cache):
    """Positions that each head keeps of a prompt of 20 tokens, read in chunks of 8."""
    with jax.numpy_dtype_promotion("standard"):
        return positions(rj.prefill(model, np.arange(20)[None], dataclasses.replace(cache, prefill_chunk=8))[1])


def kept_in_the_end(model, cache):
    """The same after 4 more tokens."""
    with jax.numpy_dtype_promotion("standard"):
        return positions(rj.generate(model, [list(range(20))], cache, max_new_tokens=5).buffer)


def positions(buffer):
    return [head.tolist() for layer in buffer.positions(0) for head in layer]


@pytest.mark.parametrize("local", (False, True))
def test_a_policy_is_a_function_and_a_row(monkeypatch, model, local):
    name = added(monkeypatch, alternating, "all")
    # Together, too, every head keeps as many: equal scores are those of one token in all heads.
    assert kept_in_the_end(model, CacheConfig(budget=4, recent=4, policy=name, local=local)) == [[16, 18, 20, 22]] * 4


def test_a_row_says_what_entries_carry(monkeypatch, model):
    # Nothing else tells tokens apart, and of equal scores the newer stays: without the mark that were 20 to 23.
    mark = lambda log_beta, prompt: jnp.full_like(log_beta, float(not prompt))
    name = added(monkeypatch, by_prompt, "all", carry=mark, needs_prompt=True)
    assert kept_in_the_end(model, CacheConfig(budget=4, recent=4, policy=name)) == [[16, 17, 18, 19]] * 4


@pytest.mark.parametrize("scope, most", [("head", 1), ("layer", 2)])
def test_a_policy_of_heads_or_layers_is_a_function_and_a_row(monkeypatch, model, scope, most):
    name = added(monkeypatch, oldest_in_layer, scope, most_in_a_head=lambda budget, kv_heads: budget * most)
    assert kept(model, CacheConfig(budget=4, recent=4, policy=name)) == [[0, 1, 2, 3]] * 4
    with pytest.raises(ValueError, match="local=True goes with the policies .*; 'added' says itself"):
        CacheConfig(budget=4, policy=name, local=True)


def test_a_row_says_which_queries_its_score_sees(monkeypatch, model):
    half = lambda budget, observe: budget // 2
    name = added(monkeypatch, attended, "head", queries=lambda observe, tokens: tokens, newest=half)
    cache = CacheConfig(budget=4, recent=4, policy=name)
    assert kept(model, cache) == kept(model, dataclasses.replace(cache, policy="h2o"))
    added(monkeypatch, attended, "head", newest=half)
    with pytest.raises(ValueError, match="needs queries: its row in the policy table must say how many"):
        kept(model, cache)


def test_a_policy_that_needs_the_future_cannot_generate(monkeypatch, model):
    name = added(monkeypatch, alternating, "all", needs_future=True)
    with pytest.raises(ValueError, match="policy 'added' needs to know the future"):
        kept(model, CacheConfig(budget=4, recent=4, policy=name))


def test_an_unknown_policy_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="policy must be one of retention, .*; got 'snap_kv', the nearest is 'snapkv'"):
        CacheConfig(budget=4, policy="snap_kv")
    with pytest.raises(ValueError, match=r"got 'full', .* for a cache that keeps everything, use CacheConfig.full"):
        CacheConfig(budget=4, policy="full")


@pytest.mark.parametrize(
    "policy, option, value, honoured_by",
    [
        ("tova", "horizon", 3, "retention"),
        ("h2o", "threshold", 0.5, "retention"),
        ("retention", "observe", 8, "snapkv, pyramidkv, adakv, rkv"),
        ("streaming", "pool_width", 3, "snapkv, pyramidkv, adakv, rkv"),
    ],
)
def test_an_option_of_other_policies_is_refused(policy, option, value, honoured_by):
    said = f"{option} belongs to the policies {honoured_by}; got {option}={value} with policy='{policy}'"
    with pytest.raises(ValueError) as error:
        CacheConfig(budget=16, policy=policy, **{option: value})
    assert said in str(error.value)
    CacheConfig(budget=16, policy=honoured_by.split(", ")[0], **{option: value})


def test_a_seed_is_of_a_run_and_no_policy_refuses_it():
    assert all(CacheConfig(budget=16, policy=name, seed=3).seed == 3 for name in table.POLICIES)


def test_a_full_cache_is_asked_for_by_name(model):
    cache = CacheConfig.full(24, recent=4, prefill_chunk=7)
    assert (cache.budget, cache.recent, cache.prefill_chunk) == (24, 4, 7)
    assert kept(model, cache) == [list(range(20))] * 4
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        CacheConfig.full(0)


def test_a_threshold_of_one_keeps_nothing_and_is_refused():
    with pytest.raises(ValueError, match="threshold=1 keeps nothing but what is protected, and nothing is"):
        CacheConfig(budget=16, threshold=1.0)

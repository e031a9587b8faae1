"""Rows with settings, seeds, limits and stop tokens of their own, and what a run of tokens may not do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model, tokens_of

import retention_jax as rj
from retention_jax.config import CacheConfig
from retention_jax.generation import runs, sampling
from retention_jax.generation.runs import DecodeState, Limits
from retention_jax.parallel import sharding

TIGHT = CacheConfig(budget=3, recent=4, prefill_chunk=5)
PROMPTS = [tokens_of(seed, length).tolist() for seed, length in ((1, 11), (2, 3), (3, 7), (1, 11))]
EACH: dict[str, Any] = dict(
    max_new_tokens=[12, 5, 9, 1],
    temperature=[0.0, 1.5, 1.0, 0.7],
    top_k=[0, 4, 0, 0],
    top_p=[1.0, 1.0, 0.9, 1.0],
    min_p=[0.5, 0.0, 0.0, 0.1],
    seed=[0, 3, 3, 2**40],
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def alone(model, row, stop_tokens=(), **changes):
    one = {name: values[row] for name, values in (EACH | changes).items()}
    return rj.generate(model, [PROMPTS[row]], TIGHT, row_ids=[row], stop_tokens=stop_tokens, **one).tokens[0]


def test_a_row_is_what_its_own_settings_make_it(model):
    out = rj.generate(model, PROMPTS, TIGHT, **EACH)
    assert [len(row) for row in out.tokens] == EACH["max_new_tokens"]
    assert out.tokens == [alone(model, row) for row in range(4)]
    assert np.asarray(out.buffer.seen).tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, (12, 5, 9, 1), strict=True)]
    assert out.tokens[0] == rj.generate(model, PROMPTS, TIGHT, max_new_tokens=12).tokens[0]  # greedy beside sampled
    arrays: dict[str, Any] = {name: np.array(values) for name, values in EACH.items()} | {
        "top_p": jnp.array(EACH["top_p"])
    }
    assert rj.generate(model, PROMPTS, TIGHT, **arrays).tokens == out.tokens


def test_one_number_is_that_number_for_all(model):
    same: dict[str, Any] = dict(temperature=1.2, top_k=9, top_p=0.95, min_p=0.01, seed=5, max_new_tokens=7)
    each: dict[str, Any] = {name: [value] * 4 for name, value in same.items()}
    assert rj.generate(model, PROMPTS, TIGHT, **same).tokens == rj.generate(model, PROMPTS, TIGHT, **each).tokens
    other = rj.generate(model, PROMPTS, TIGHT, **{**each, "seed": [5, 5, 6, 5]}).tokens
    told = rj.generate(model, PROMPTS, TIGHT, **same).tokens
    assert [a == b for a, b in zip(told, other, strict=True)] == [True, True, False, True]


def test_each_row_has_its_own_stop_tokens(model):
    free = rj.generate(model, PROMPTS, TIGHT, max_new_tokens=12).tokens
    assert free[0] == free[3]  # the same prompt
    stops = [[free[0][2]], [], [free[2][4], free[2][1]], [free[3][6], 31, 30]]
    out = rj.generate(model, PROMPTS, TIGHT, max_new_tokens=12, stop_tokens=stops).tokens
    until = lambda row, stop: row[: next((i + 1 for i, t in enumerate(row) if t in stop), 12)]
    assert out == [until(row, stop) for row, stop in zip(free, stops, strict=True)]
    assert len({len(row) for row in out}) > 2
    flat = rj.generate(model, PROMPTS, TIGHT, max_new_tokens=12, stop_tokens=stops[2]).tokens
    assert flat == [until(row, stops[2]) for row in free]


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(max_new_tokens=[3, 0, 2, -1]), "max_new_tokens .* got 0 for row 1; max_new_tokens .* got -1 for row 3"),
        (dict(temperature=[1.0, 1.0]), "temperature must be 4 numbers, got 2"),
        (dict(top_k=2**31), f"top_k must be .* to {2**31 - 1}, got {2**31}"),
        (dict(top_k=[1, 2**70, 1, 1]), f"got {2**70} for row 1"),
        (dict(seed=2**63, top_p=[1, 1, 1, 1.5]), "top_p must be .* got 1.5 for row 3; seed must be"),
        (dict(row_ids=[0, 1, 2, 2**31]), f"row_ids must be .* got {2**31} for row 3"),
        (dict(stop_tokens=[[1], [2]]), "stop_tokens must be 4 lists, got 2"),
        (dict(stop_tokens=[-1, 5, 2**31]), f"stop_tokens must be in .* got -1, {2**31}"),
    ),
)
def test_every_bad_value_is_named_with_its_row(model, options, message):
    with pytest.raises(ValueError, match=message):
        rj.generate(model, PROMPTS, TIGHT, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize("temperature", (0.0, [0.0, 1.0, 1.0, 0.0]))
def test_logits_that_are_not_finite_are_an_error(model, temperature):
    """They gave token 0 without a word."""
    broken = nnx.clone(model)
    broken.embedding[...] = model.embedding[...].at[:, 0].set(jnp.nan)
    with pytest.raises(
        ValueError, match=r"not finite for prompt 0 at new token 0, prompt 1 at new token 0, .*: the wei"
    ):
        rj.generate(broken, PROMPTS, TIGHT, max_new_tokens=3, temperature=temperature)


def test_the_error_names_prompt_and_token(model):
    """Only one prompt ever reads the token whose embedding is NaN. What it makes next is named, and no other prompt."""
    told = rj.generate(model, PROMPTS[:3], TIGHT, max_new_tokens=12).tokens
    read_by = lambda token: [row for row in range(3) if token in PROMPTS[row] or token in told[row]]
    row, at = next((r, i) for r, new in enumerate(told) for i, t in enumerate(new) if read_by(t) == [r] and i < 11)
    at = told[row].index(told[row][at])
    broken = nnx.clone(model)
    broken.embedding[...] = model.embedding[...].at[told[row][at]].set(jnp.nan)
    with pytest.raises(ValueError, match=f"not finite for prompt {row} at new token {at + 1}:"):
        rj.generate(broken, PROMPTS[:3], TIGHT, max_new_tokens=12)


def started(model, rows=2):
    """A state after a prompt, with sampled and greedy rows, on the device."""
    logits, buffer = rj.prefill(model, tokens_of(4, rows, 6), TIGHT)
    how = sampling.settings([1.0] + [0.0] * (rows - 1), seed=1, row_ids=range(rows))
    zero = lambda: jnp.zeros(rows, jnp.int32)
    state = DecodeState(jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(rows, bool), zero() + 1, buffer)
    return state, how, Limits(zero() + 100, zero()[:, None] - 1)


def test_a_run_makes_no_transfer(model):
    """Nothing comes from the host while a run is started, and its program calls nothing on the host."""
    state, how, limits = started(model)
    text = runs.decode_run.lower(model, state, how, limits, 9).as_text()
    assert not [word for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv") if word in text]
    with jax.transfer_guard("disallow"):
        state, tokens, count, _ = runs.decode_run(model, state, how, limits, 9)  # several evictions
        state, more, count, _ = runs.decode_run(model, state, how, limits, 9)
    assert np.asarray(count).tolist() == [9, 9] and np.asarray(state.step).tolist() == [19, 19]
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        runs.decode_run(model, state._replace(newest=np.zeros(2, np.int32)), how, limits, 9)


def test_a_run_takes_up_where_another_left_off(model):
    state, how, limits = started(model, 3)
    whole = runs.decode_run(model, state, how, limits, 12)
    state, how, limits = started(model, 3)
    pieces = []
    for _ in range(4):
        state, tokens, count, _ = runs.decode_run(model, state, how, limits, 3)
        pieces.append(np.asarray(tokens))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[1])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_log_probabilities_are_told_where_a_row_wants_them(model):
    """And rows that fill up evict one by one as they do together."""
    state, how, limits = started(model)
    limits = limits._replace(max_new_tokens=jnp.array([100, 7]))
    without = runs.decode_run(model, state, how, limits, 9)
    assert [a.shape for a in without[3]] == [(2, 0), (2, 0, 20), (2, 0, 20)]
    for wanted in ([False, True], [False, False]):
        state, how, _ = started(model)
        found = runs.decode_run(model, state, how, limits, 9, wanted=jnp.array(wanted), row_by_row=True)
        for a, b in zip(jax.tree.leaves(found[:3]), jax.tree.leaves(without[:3]), strict=True):
            np.testing.assert_array_equal(a, b)
        told = jax.tree.map(np.asarray, found[3])
        asked = np.arange(9) < (6 if any(wanted) else 0)  # the second row's seventh token came before this run
        assert (told.chosen != 0).tolist() == [asked.tolist()] * 2
        greedy = told.tokens[1, asked, 0]
        assert greedy.tolist() == np.asarray(found[1])[1, asked].tolist()
        assert (told.chosen[1, asked] == told.likeliest[1, asked, 0]).all()
        assert (np.diff(told.likeliest, axis=-1) <= 0).all()
        assert np.exp(told.likeliest[:, asked]).sum(-1).max(initial=0) <= 1


def test_a_row_that_ended_can_go_on_beside_the_others(model):
    """Steps and limits belong to rows: a row that pauses makes the tokens that it makes without a pause."""
    state, how, limits = started(model)
    limits = limits._replace(max_new_tokens=jnp.array([3, 100]))
    state, first, count, _ = runs.decode_run(model, state, how, limits, 5)
    assert np.asarray(count).tolist() == [2, 5] and np.asarray(state.done).tolist() == [True, False]
    state = state._replace(done=jnp.array([False, False]))
    limits = limits._replace(max_new_tokens=jnp.array([8, 100]))
    state, second, count, _ = runs.decode_run(model, state, how, limits, 6)
    assert np.asarray(count).tolist() == [5, 6]
    whole_state, how, limits = started(model)
    _, whole, _, _ = runs.decode_run(model, whole_state, how, limits, 12)
    got = [
        np.concatenate([np.asarray(first)[row, :a], np.asarray(second)[row, :b]])
        for row, a, b in ((0, 2, 5), (1, 5, 6))
    ]
    np.testing.assert_array_equal(got[0], np.asarray(whole)[0, :7])
    np.testing.assert_array_equal(got[1], np.asarray(whole)[1, :11])


def test_settings_over_rows_on_a_mesh(model):
    want = rj.generate(model, PROMPTS, TIGHT, **EACH, stop_tokens=[[1], [2, 3], [], [4]]).tokens
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        got = rj.generate(model, PROMPTS, TIGHT, **EACH, stop_tokens=[[1], [2, 3], [], [4]]).tokens
    assert got == want

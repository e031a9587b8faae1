"""The recall task: what its slots hold, and that every answer can be found earlier in the stream."""

import itertools

import numpy as np
import pytest

from retention_jax.data import recall

pytestmark = pytest.mark.one_version

LENGTHS = (3, 9, 60, 64, 191, 192, 768)  # 64 and 191 leave one and two tokens after the last slot
DECOYS = (0.0, 0.3, 0.6)
SEEDS = range(5)
CASES = list(itertools.product(LENGTHS, DECOYS, SEEDS))


def make(length, decoys, seed):
    return recall.stream(np.random.default_rng(seed), length, decoys)


def slots_of(tokens):
    return tokens[: len(tokens) // recall.SLOT * recall.SLOT].reshape(-1, recall.SLOT)


def is_noise(x):
    return (x >= recall.FIRST_NOISE) & (x < recall.FIRST_KEY)


def is_key(x):
    return (x >= recall.FIRST_KEY) & (x < recall.FIRST_VALUE)


def is_value(x):
    return (x >= recall.FIRST_VALUE) & (x < recall.VOCAB_SIZE)


@pytest.mark.parametrize("length, decoys, seed", CASES)
def test_every_slot_is_a_fact_a_query_a_decoy_or_noise(length, decoys, seed):
    tokens, label_mask = make(length, decoys, seed)
    assert tokens.shape == label_mask.shape == (length,)
    assert tokens.dtype == np.int32 and label_mask.dtype == np.bool_
    first, key, value = slots_of(tokens).T
    pair = is_key(key) & is_value(value)
    fact, query, decoy = (first == recall.MARK) & pair, (first == recall.ASK) & pair, is_noise(first) & pair
    noise = is_noise(first) & is_noise(key) & is_noise(value)
    assert np.all(fact.astype(int) + query + decoy + noise == 1)
    assert np.all(is_noise(tokens[len(first) * recall.SLOT :]))


@pytest.mark.parametrize("length, decoys, seed", CASES)
def test_every_answer_is_an_earlier_fact_and_the_only_thing_scored(length, decoys, seed):
    tokens, label_mask = make(length, decoys, seed)
    values, answers = {}, []
    for i, (first, key, value) in enumerate(slots_of(tokens)):
        if first == recall.MARK:
            assert key not in values, "a key is stated twice"
            values[key] = value
        elif first == recall.ASK:
            assert values[key] == value
            answers.append(i * recall.SLOT + 2)
    assert values
    np.testing.assert_array_equal(np.flatnonzero(label_mask), answers)


@pytest.mark.parametrize("length, decoys, seed", [c for c in CASES if c[0] >= 60])
def test_shares_of_facts_queries_and_decoys(length, decoys, seed):
    first, key, _ = slots_of(make(length, decoys, seed).tokens).T
    slots = length // recall.SLOT
    facts = min(recall.NUM_KEYS, round(recall.FACT_SHARE * slots))
    assert np.sum(first == recall.MARK) == facts
    assert np.sum(first == recall.ASK) == round(recall.QUERY_SHARE * slots)
    assert np.sum(is_noise(first) & is_key(key)) == round(decoys * slots)


def test_decoys_contradict_facts():
    contradictions = 0
    for seed in SEEDS:
        slots = slots_of(make(192, 0.3, seed).tokens)
        values = {k: v for first, k, v in slots if first == recall.MARK}
        contradictions += sum(is_noise(f) and k in values and values[k] != v for f, k, v in slots)
    assert contradictions > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_same_rng_same_stream_and_other_rng_other_stream(seed):
    for a, b, other in (
        (make(192, 0.3, seed), make(192, 0.3, seed), make(192, 0.3, seed + 1)),
        (*(recall.copy(np.random.default_rng(s), 192) for s in (seed, seed, seed + 1)),),
    ):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.label_mask, b.label_mask)
        assert np.any(a.tokens != other.tokens)


@pytest.mark.parametrize("length, seed", list(itertools.product((3, 8, 191, 192), SEEDS)))
def test_copy_repeats_itself_and_scores_what_can_be_known(length, seed):
    tokens, label_mask = recall.copy(np.random.default_rng(seed), length)
    periods = [p for p in range(1, length // 2 + 1) if np.array_equal(tokens[p:], tokens[:-p])]
    assert periods
    assert np.all((tokens >= recall.FIRST_NOISE) & (tokens < recall.VOCAB_SIZE))
    # The repetition's first token cannot be known: nothing says that the sequence begins again.
    scored = np.flatnonzero(label_mask)
    assert scored.tolist() == list(range(scored[0], length)) and scored[0] - 1 in periods

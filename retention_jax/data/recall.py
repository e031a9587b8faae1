"""Associative recall in a stream with decoys: synthetic, so a score is exact.

A stream is made of three-token slots in random order:

    fact    MARK key value      each key is stated once in a stream
    query   ASK  key value      about an earlier fact; the value is the answer, the only token that is scored
    decoy   noise key value     looks like a fact but for its first token, and may contradict one
    noise   noise noise noise

The longer the stream, the more decoys compete with each fact for attention: the full cache is diluted. A retention gate
sees MARK one or two tokens back and can keep facts while it forgets everything else.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

PAD, MARK, ASK = 0, 1, 2
NUM_NOISE, NUM_KEYS, NUM_VALUES = 13, 32, 16
FIRST_NOISE = 3
FIRST_KEY = FIRST_NOISE + NUM_NOISE
FIRST_VALUE = FIRST_KEY + NUM_KEYS
VOCAB_SIZE = FIRST_VALUE + NUM_VALUES

SLOT = 3
FACT_SHARE, QUERY_SHARE = 0.12, 0.25  # of all slots; decoys are configured, noise is the rest


class Stream(NamedTuple):
    tokens: np.ndarray  # int32 [length]
    label_mask: np.ndarray  # bool [length], True at the answers


def stream(rng: np.random.Generator, length: int, decoys: float) -> Stream:
    """One stream of `length` tokens whose share of decoy slots is `decoys`."""
    slots = length // SLOT
    num_facts = min(NUM_KEYS, max(1, round(FACT_SHARE * slots)))
    num_queries, num_decoys = round(QUERY_SHARE * slots), round(decoys * slots)
    kinds = np.zeros(slots, np.int32)  # 0 noise, 1 fact, 2 query, 3 decoy
    kinds[:num_facts], kinds[num_facts : num_facts + num_queries] = 1, 2
    kinds[num_facts + num_queries : num_facts + num_queries + num_decoys] = 3
    rng.shuffle(kinds)
    # A query needs an earlier fact: the first slot of either kind becomes the fact.
    first = np.flatnonzero((kinds == 1) | (kinds == 2))[0]
    fact = np.flatnonzero(kinds == 1)[0]
    kinds[first], kinds[fact] = kinds[fact], kinds[first]

    tokens = rng.integers(FIRST_NOISE, FIRST_KEY, (slots, SLOT), dtype=np.int32)
    facts, queries, decoy_slots = (np.flatnonzero(kinds == k) for k in (1, 2, 3))
    tokens[facts, 0] = MARK
    tokens[facts, 1] = FIRST_KEY + rng.permutation(NUM_KEYS)[: len(facts)]
    tokens[facts, 2] = rng.integers(FIRST_VALUE, VOCAB_SIZE, len(facts))
    tokens[decoy_slots, 1] = rng.integers(FIRST_KEY, FIRST_VALUE, len(decoy_slots))
    tokens[decoy_slots, 2] = rng.integers(FIRST_VALUE, VOCAB_SIZE, len(decoy_slots))
    earlier = np.searchsorted(facts, queries)  # facts stated before each query, at least one
    asked = facts[rng.integers(0, earlier)] if len(queries) else queries
    tokens[queries, 0] = ASK
    tokens[queries, 1:] = tokens[asked, 1:]

    label_mask = np.zeros((slots, SLOT), bool)
    label_mask[queries, 2] = True
    tail = rng.integers(FIRST_NOISE, FIRST_KEY, length - slots * SLOT, dtype=np.int32)
    return Stream(
        np.concatenate([tokens.reshape(-1), tail]), np.concatenate([label_mask.reshape(-1), np.zeros(len(tail), bool)])
    )


def facts_at(tokens: Int[np.ndarray, "*axes T"]) -> Bool[np.ndarray, "*axes T keys"]:
    """Which facts each token of streams can tell of, by their keys: those of its own slot and of the slot before it.

    A fact is stated in its slot; any later token may carry it on, since a layer can copy what stands a few tokens back.
    The shipped backbone does just that: its last layer reads facts at the third token behind their slots.
    """
    slots = tokens[..., : tokens.shape[-1] // SLOT * SLOT].reshape(*tokens.shape[:-1], -1, SLOT)
    stated = (slots[..., :1] == MARK) & (slots[..., 1:2] == FIRST_KEY + np.arange(NUM_KEYS))
    at = np.zeros((*tokens.shape, NUM_KEYS), bool)
    at[..., : slots.shape[-2] * SLOT, :] = np.repeat(stated, SLOT, axis=-2)
    at[..., SLOT:, :] |= at[..., :-SLOT, :].copy()  # the right side is what stood there before
    return at


def copy(rng: np.random.Generator, length: int) -> Stream:
    """A random sequence repeated to the end and scored on its repetitions: it teaches a backbone to look back.

    The period is random, so that only looking for equal tokens helps, not looking a fixed distance back.
    """
    period = int(rng.integers(max(1, length // 6), length // 2 + 1))
    once = rng.integers(FIRST_NOISE, VOCAB_SIZE, period, dtype=np.int32)
    return Stream(np.resize(once, length), np.arange(length) > period)

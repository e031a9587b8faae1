"""Facts told in the first turns of a conversation, and asked for after many tokens of other talk.

    4 turns       tell two facts each
    many turns    hand over passages of a text, or talk of something else: LENGTH tokens in all
    8 turns       ask for the facts, one each, in another order

All turns are read on one buffer, so whatever is evicted is evicted before a question is known. As in RULER, the
answer's beginning is given ("Ada's birthday is"); as in SCBench, later turns are read behind the right answer, not the
model's. So the score tells what is remembered, and not how well a small model converses. An answer is right if the
fact's value stands in it as a word of its own.

The text in between is the user's. Facts and wordings are made as those of the training data are (`corpus/`), but from
draws of their own: no file of training data has the second word of their seeds. So the facts are new, and their kinds
are not.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from retention_jax.corpus import attributes, facts, passages, talk
from retention_jax.corpus.facts import Fact
from retention_jax.corpus.passages import Piece
from retention_jax.corpus.words import Rng, pick, sample
from retention_jax.tasks.example import Example, Task, Turn

_EVALUATION = 2  # second word of the seeds; those of training files are in `corpus/__main__.py`
_FACTS, _TOLD_TOGETHER = 8, 2
_PASSAGE = 600  # tokens of a passage and the talk behind it, about
_ANSWER = 32  # tokens
SHORTEST = 200  # tokens between facts and questions

Encode = Callable[[str], list[int]]


class _Asked(NamedTuple):
    """A fact as it is told and asked for."""

    told: str
    question: str
    begun: str  # of the answer
    values: tuple[str, ...]


def load(source: str, *, encode: Encode, length: int, examples: int, seed: int) -> Task:
    """Conversations with `length` tokens between the last fact and the first question.

    Args:
      source: a text, as `sources.text` reads it; use one that no gate was trained on.
      encode: text to token ids; only their number is used.
      length: tokens of what user and assistant say in between, at most and but for a few words. A chat template's own
        tokens come on top.
      examples: how many.
      seed: not negative.

    Raises:
      ValueError: when the length is too short, and as `passages.read` does.
    """
    if length < SHORTEST:
        raise ValueError(f"conversation: length must be at least {SHORTEST}, got {length}")
    text = passages.read(source)
    made = tuple(
        _example(np.random.default_rng((seed, _EVALUATION, i)), i, text, encode, length) for i in range(examples)
    )
    return Task(
        made, "accuracy", lambda example, turn, answer: score(example.turns[turn], answer), True, "this package"
    )


def score(turn: Turn, answer: str) -> float:
    """Whether every value stands in the answer, in any case and not as a part of a longer word or number."""
    found = [re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) for value in turn.gold]
    return float(all(found))


def _example(rng: Rng, index: int, text: list[Piece], encode: Encode, length: int) -> Example:
    told, turns = _facts(rng), []
    for start in range(0, _FACTS, _TOLD_TOGETHER):
        said = " ".join(fact.told for fact in told[start : start + _TOLD_TOGETHER])
        turns.append(_only_read(said, pick(rng, talk.NOTED)))
    turns += _between(rng, passages.run(rng, [text]), encode, length)
    asked = [told[i] for i in rng.permutation(_FACTS)]
    turns += [Turn(f.question, f.values, _ANSWER, f.begun, told=f" {f.values[0]}.") for f in asked]
    return Example(str(index), "", tuple(turns))


def _only_read(user: str, assistant: str) -> Turn:
    return Turn(user, (), 0, told=assistant)


def _facts(rng: Rng) -> list[_Asked]:
    """Facts of different kinds about different things; no value stands in another fact."""
    found: list[Fact] = []
    asked = []
    for attribute in sample(rng, (*attributes.PERSONAL, *attributes.OTHER), _FACTS):
        while _mixed_up(fact := facts.one(rng, attribute), found):
            pass
        found.append(fact)
        begun = attributes.to_the_user(attributes.fill("{Topic} is", attribute, fact.subjects[0]))
        asked.append(_Asked(fact.told[0], fact.question, begun, fact.values))
    return asked


def _mixed_up(fact: Fact, others: list[Fact]) -> bool:
    texts = lambda fact: " ".join((*fact.told, fact.question)).lower()
    inside = lambda one, other: any(value.lower() in texts(other) for value in one.values)
    alike = lambda other: set(fact.subjects) & set(other.subjects) or inside(fact, other) or inside(other, fact)
    return any(map(alike, others)) or any(value.lower() in fact.question.lower() for value in fact.values)


def _between(rng: Rng, source: Iterator[Piece], encode: Encode, length: int) -> list[Turn]:
    """Passages, each followed by other talk, of `length` tokens together."""
    count = -(-length // _PASSAGE)
    size = lambda *texts: sum(len(encode(text)) for text in texts)
    wordings = [pick(rng, talk.NEXT if i else talk.FIRST) for i in range(count)]
    read = [pick(rng, talk.READ) for _ in wordings]
    chats: dict[str, str] = {}
    while len(chats) < count:
        chats.update([talk.other(rng)])
    left = length - size(*wordings, *read, *chats, *chats.values())
    turns = []
    for i, (wording, acknowledged, (user, assistant)) in enumerate(zip(wordings, read, chats.items(), strict=True)):
        passage = _passage(source, encode, left // (count - i))
        left -= size(passage)
        turns += [_only_read(wording.replace("{text}", passage), acknowledged), _only_read(user, assistant)]
    return turns


def _passage(source: Iterator[Piece], encode: Encode, tokens: int) -> str:
    """The next pieces of a text, up to so many tokens."""
    pieces: list[Piece] = []
    while len(encode(text := passages.join(pieces))) < tokens:
        pieces.append(next(source))
    while len(encode(text)) > tokens and " " in text:
        text = text.rpartition(" ")[0]
    return text

"""Prompts of RULER's synthetic tasks, word for word and with the numbers of NVIDIA/RULER (arXiv 2404.06654).

Each function makes one prompt from a seed and an amount: how many lines, words or needles its haystack has. The same
seed with a larger amount is nearly the same prompt with more in it, so that an amount can be searched for.

What differs from the repository: every example has its own order (there, one order serves all examples), keys and
values of needles do not repeat, and sentences of an essay end at `.`, `!` or `?` before a space, where it asks NLTK.
"""

import functools
import itertools
import re
import string
import uuid
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import wonderwords

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HOPS = 4  # of a chain: five variables have the value
COMMON = 10  # words that are asked for
FEWEST_CODED = 73  # with a / (pi^2 / 6) / rank^2 words each, no tie is possible between ranks 1 to 5 from here on
FEWEST_WORDS = COMMON + 1

_DEPTHS = np.round(np.linspace(0, 100, 40))  # per cent of an essay's sentences that stand before a needle


class Prompt(NamedTuple):
    """Context, question and answer prefix follow one another with nothing in between."""

    context: str
    question: str
    answer_prefix: str
    gold: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.context + self.question + self.answer_prefix


class Needles(NamedTuple):
    """A kind of needle task: what hides the needles, what they are, how many there are and how many are asked for."""

    haystack: Literal["repeat", "essay", "needle"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1  # of every key
    asked: int = 1  # keys


def needles(kind: Needles, essay: Sequence[str], amount: int, seed: Sequence[int]) -> Prompt:
    """Needles in a haystack of `amount` words of the essay, begun anew at its end, or of `amount` lines."""
    keys_rng, values_rng, rng = _rngs(seed, 3)
    hidden, others = kind.keys * kind.values, amount if kind.haystack == "needle" else 0
    keys = _distinct(lambda: _DRAWS[kind.key](keys_rng), kind.keys + others)
    values = _distinct(lambda: _DRAWS[kind.value](values_rng), hidden + others)
    owners = [key for key in keys[: kind.keys] for _ in range(kind.values)] + keys[kind.keys :]
    told = [
        f"One of the special magic {kind.value}s for {key} is: {value}."
        for key, value in zip(owners, values, strict=True)
    ]

    if kind.haystack == "essay":
        parts = re.split(r"(?<=[.!?]) ", " ".join(itertools.islice(itertools.cycle(essay), amount)))
        places = (len(parts) * rng.choice(_DEPTHS, hidden, replace=False) / 100).astype(int)
    else:
        parts = told[hidden:] if kind.haystack == "needle" else [NOISE] * amount
        places = rng.choice(amount, hidden, replace=False)
    parts = _insert(parts, places, [told[i] for i in rng.permutation(hidden)])
    haystack = (" " if kind.haystack == "essay" else "\n").join(parts)

    asked = rng.permutation(kind.keys)[: kind.asked]
    names = [keys[i] for i in asked]
    query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
    many = kind.asked * kind.values > 1
    some, are, are_all = ("Some", "are", "are all") if many else ("A", "is", "is")
    what = kind.value + "s" if many else kind.value
    return Prompt(
        context=f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. I will "
        f"quiz you about the {what} afterwards.\n{haystack}\n",
        question=f"What {are_all} the special magic {what} for {query} mentioned in the provided text?",
        answer_prefix=f" The special magic {what} for {query} mentioned in the provided text {are}",
        gold=tuple(value for i in asked for value in values[i * kind.values : (i + 1) * kind.values]),
    )


def variables(lines: int, demonstration_lines: int, seed: Sequence[int]) -> Prompt:
    """A chain of assignments in `lines` lines of noise, after a worked example with a chain of its own."""
    demonstration, prompt = chain(demonstration_lines, 3, (*seed, 0)), chain(lines, 5, (*seed, 1))
    shown = f"{demonstration.text} {' '.join(demonstration.gold)}\n\n"
    return prompt._replace(context=shown + prompt.context)


def chain(lines: int, letters: int, seed: Sequence[int]) -> Prompt:
    """One chain of variables whose names have `letters` letters."""
    names_rng, rng = _rngs(seed, 2)
    names = _distinct(lambda: _letters(string.ascii_uppercase, letters, names_rng), HOPS + 1)
    value = str(rng.integers(10_000, 99_999))
    told = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False))]
    haystack = "\n".join(_insert([NOISE] * lines, rng.choice(lines, HOPS + 1, replace=False), told))
    return Prompt(
        context=f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{haystack}\n",
        question=f"Question: Find all variables that are assigned the value {value} in the text above.",
        # The repository had "assgined" at first.
        answer_prefix=" Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are: ",
        gold=tuple(names),
    )


def common_words(amount: int, words: Sequence[str], length: int, seed: Sequence[int]) -> Prompt:
    """A numbered list of `amount` different words, ten of them more often than the others, after a worked example.

    At less than 4,096 tokens words repeat less.
    """
    demonstration_rng, rng = _rngs(seed, 2)
    shown, repeats = ((20, 3, 1), (6, 1)) if length < 4096 else ((40, 10, 3), (30, 3))
    demonstration = _word_list(words, *shown, demonstration_rng)
    prompt = _word_list(words, amount, *repeats, rng)
    return prompt._replace(context=f"{demonstration.text} {_numbered(demonstration.gold)}\n{prompt.context}")


def _word_list(words: Sequence[str], amount: int, repeats: int, other_repeats: int, rng: np.random.Generator) -> Prompt:
    chosen = [words[int(i)] for i in rng.permutation(len(words))[:amount]]
    listed = chosen[:COMMON] * repeats + chosen[COMMON:] * other_repeats
    return Prompt(
        context="Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
        f"ones that appear most often.\n{_numbered([listed[i] for i in rng.permutation(len(listed))])}\n",
        question="Question: What are the 10 most common words in the above list?",
        answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
        gold=tuple(chosen[:COMMON]),
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(amount: int, length: int, seed: Sequence[int]) -> Prompt:
    """Coded words whose frequency falls with the square of their rank, some `amount` in all; the first is dots."""
    rng, order = _rngs(seed, 2)
    words = ["...", *_distinct(lambda: _letters(string.ascii_lowercase, 6, rng), length // 50 - 1)]
    counts = (amount / (np.pi**2 / 6) / np.arange(1, len(words) + 1) ** 2).astype(int)
    told = np.repeat(np.array(words, object), counts)
    return Prompt(
        context="Read the following coded text and track the frequency of each coded word. Find the three most "
        f"frequently appeared coded words. {' '.join(order.permutation(told))}\n",
        question="Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text?",
        answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
        gold=tuple(words[1:4]),
    )


@functools.cache
def english_words(category: str) -> list[str]:
    """The words of a category of wonderwords, which RULER draws from too: "noun", "adjective" or "verb"."""
    return wonderwords.RandomWord().filter(include_categories=[category])


def _word(rng: np.random.Generator) -> str:
    adjectives, nouns = english_words("adjective"), english_words("noun")
    return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"


_DRAWS: dict[str, Callable[[np.random.Generator], str]] = {
    "word": _word,
    "number": lambda rng: str(rng.integers(10**6, 10**7)),
    "uuid": lambda rng: str(uuid.UUID(bytes=rng.bytes(16), version=4)),
}


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    """The first `count` different strings that are drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _rngs(seed: Sequence[int], count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]


def _letters(alphabet: str, count: int, rng: np.random.Generator) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), count))


def _insert(parts: Sequence[str], places: np.ndarray, what: Sequence[str]) -> list[str]:
    """`parts` with `what`, in order, before the parts at `places`, in any order."""
    return np.insert(np.array(parts, object), np.sort(places), np.array(what, object)).tolist()

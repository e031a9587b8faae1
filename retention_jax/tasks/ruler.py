"""RULER's 13 tasks (arXiv 2404.06654, NVIDIA/RULER): prompts of any length under any tokenizer, or prepared rows.

    niah_*        find the values of asked keys; haystacks of noise, of an essay, or of other needles
    vt            follow a chain of variable assignments
    cwe, fwe      find the most common words
    qa_1, qa_2    answer SQuAD's and HotpotQA's questions among many documents

The published results hide needles in Paul Graham's essays, which are not ours to ship: `haystack` names a file with
them, or with any other long text.
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import tqdm
from absl import logging

from retention_jax.data import sources
from retention_jax.runtime import files
from retention_jax.tasks import ruler_documents, ruler_prompts
from retention_jax.tasks.example import Example, Task, Turn
from retention_jax.tasks.ruler_prompts import Needles, Prompt

SOURCE = "arXiv 2404.06654, github.com/NVIDIA/RULER"
SHORTEST = 256  # tokens
_DEMONSTRATION = 500  # tokens of the example in `vt`

NEEDLES = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuid"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuid", value="uuid"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
}
LIBRARIES = {"qa_1": ruler_documents.squad, "qa_2": ruler_documents.hotpotqa}
NAMES = (*NEEDLES, "vt", "cwe", "fwe", *LIBRARIES)


class Family(NamedTuple):
    """What tasks have in common."""

    max_new_tokens: int
    metric: str
    question: re.Pattern[str]  # begins the last part of a prompt
    answer_prefix: str  # begins the answer prefix


FAMILIES = {
    "niah": Family(
        128, "string_match_all", re.compile("What (?:is|are all) the special magic "), " The special magic "
    ),
    "vt": Family(30, "string_match_all", re.compile("Question: Find all variables "), " Answer: "),
    "cwe": Family(120, "string_match_all", re.compile("Question: What are the 10 most common "), " Answer: "),
    "fwe": Family(50, "string_match_all", re.compile("Question: Do not provide any explanation"), " Answer: "),
    "qa": Family(32, "string_match_part", re.compile("Answer the question based on the given documents"), " Answer:"),
}


def string_match(metric: str, gold: tuple[str, ...], answer: str) -> float:
    """Share of the reference answers that the answer contains, in any case; `string_match_part`: 1 if it has one."""
    found = [text.lower() in answer.lower() for text in gold]
    return float(any(found)) if metric == "string_match_part" else sum(found) / len(found)


def load(
    name: str,
    *,
    encode: Callable[[str], list[int]],
    length: int,
    examples: int,
    seed: int,
    haystack: str = "",
    qa: str = "",
) -> Task:
    """A task whose prompts fill a length. What comes depends on the arguments only.

    Args:
      name: one of `NAMES`.
      encode: text to token ids; only their number is used.
      length: tokens of context, question, answer prefix and what is to be generated, together and at most. A chat
        template's own tokens come on top.
      examples: how many; of the qa tasks, the first questions of the file.
      seed: not negative.
      haystack: long text for the tasks that hide needles in an essay, as `sources.text` reads it; of a text that is
        too short the beginning follows its end.
      qa: a .json file, SQuAD for qa_1 and HotpotQA for qa_2, as published.

    Raises:
      ValueError: on an unknown name, bad numbers, or files that are missing or not understood, when the smallest
        prompt is longer than `length`, or when there are too few documents to fill it. Of cwe, whose words end at some
        100,000 tokens, longer prompts stop there, with a warning, as the published ones do.
    """
    _check(name, length, examples, seed, haystack, qa)
    family = FAMILIES["niah" if name in NEEDLES else name.split("_")[0]]
    recipe = _recipe(name, encode, length, seed, haystack, qa)
    if examples > recipe.examples:
        raise ValueError(f"{name}: {qa} has {recipe.examples} questions, examples={examples} are asked for")

    def size(prompt: Prompt) -> int:
        return len(encode(prompt.text)) + family.max_new_tokens

    made, amount = [], 1
    for index in tqdm.tqdm(range(examples), desc=f"{name} {length}", leave=False, disable=None):
        make = functools.partial(recipe.prompt, index)
        least = recipe.least(index)
        if (smallest := size(make(least))) > length:
            raise ValueError(f"{name}, example {index}: needs {smallest} tokens at least, length={length}")
        amount = largest(lambda n, make=make: size(make(n)) <= length, amount, least, recipe.most)
        prompt = make(amount)
        if amount == recipe.most and (longest := size(prompt)) < 0.95 * length:
            told = f"{name}: there is text for {longest} tokens, length={length}"
            if name != "cwe":
                raise ValueError(told)
            if index == 0:
                logging.warning("%s: all English words are listed, as in the published prompts", told)
        made.append(_example(f"{name}/{length}/{index}", prompt, family))
    return _task(made, family)


def largest(fits: Callable[[int], bool], start: int, least: int, most: int) -> int:
    """The largest amount in [least, most] that fits, where `least` does and no larger one fits; quick near `start`."""
    low, step = min(max(start, least), most), 1
    if low > least and not fits(low):
        high, low = low, max(low - 1, least)
        while low > least and not fits(low):
            step *= 2
            high, low = low, max(low - step, least)
    else:
        high = low + 1
        while high <= most and fits(high):
            step *= 2
            low, high = high, min(high + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Recipe(NamedTuple):
    """How the prompts of a task are made."""

    prompt: Callable[[int, int], Prompt]  # of an example's index and an amount
    least: Callable[[int], int]  # amount of an example
    most: int = sys.maxsize  # amount
    examples: int = sys.maxsize


def _recipe(name: str, encode: Callable[[str], list[int]], length: int, seed: int, haystack: str, qa: str) -> _Recipe:
    match name:
        case "vt":
            shown = ruler_prompts.HOPS + 1
            while _demonstration_tokens(shown + 1, encode, seed) <= _DEMONSTRATION:
                shown += 1
            return _Recipe(
                lambda index, amount: ruler_prompts.variables(amount, shown, (seed, index)),
                lambda index: ruler_prompts.HOPS + 1,
            )
        case "cwe":
            words = sorted(
                {word for kind in ("noun", "adjective", "verb") for word in ruler_prompts.english_words(kind)}
            )
            return _Recipe(
                lambda index, amount: ruler_prompts.common_words(amount, words, length, (seed, index)),
                lambda index: ruler_prompts.FEWEST_WORDS,
                len(words),
            )
        case "fwe":
            return _Recipe(
                lambda index, amount: ruler_prompts.frequent_words(amount, length, (seed, index)),
                lambda index: ruler_prompts.FEWEST_CODED,
            )
        case "qa_1" | "qa_2":
            library = LIBRARIES[name](qa)
            return _Recipe(
                lambda index, amount: ruler_documents.prompt(library, index, amount, (seed, index)),
                lambda index: len(library.questions[index].own),
                len(library.documents),
                len(library.questions),
            )
        case _:
            kind = NEEDLES[name]
            essay = sources.text(haystack).split() if kind.haystack == "essay" else []
            return _Recipe(
                lambda index, amount: ruler_prompts.needles(kind, essay, amount, (seed, index)),
                lambda index: kind.keys * kind.values,
            )


def _demonstration_tokens(lines: int, encode: Callable[[str], list[int]], seed: int) -> int:
    prompt = ruler_prompts.chain(lines, 3, (seed,))
    return len(encode(f"{prompt.text} {' '.join(prompt.gold)}"))


def _check(name: str, length: int, examples: int, seed: int, haystack: str, qa: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown RULER task {name!r}; known: {', '.join(NAMES)}")
    problems = []
    if length < SHORTEST:
        problems.append(f"length must be at least {SHORTEST}, got {length}")
    if examples < 1:
        problems.append(f"examples must be at least 1, got {examples}")
    if seed < 0:
        problems.append(f"seed must not be negative, got {seed}")
    if name in NEEDLES and NEEDLES[name].haystack == "essay" and not haystack:
        problems.append("haystack must name a file of long text; the published one is Paul Graham's essays")
    if name in LIBRARIES and not qa:
        problems.append(f"qa must name {'SQuAD' if name == 'qa_1' else 'HotpotQA'}'s .json file")
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))


def from_rows(source: str) -> Task:
    """The rows of one prepared task: objects with `input`, `outputs` and, unless `input` ends in it, `answer_prefix`.

    The question begins where its template begins, and the answer prefix too, both for the last time.

    Raises:
      ValueError: as `sources.objects` does, when a row lacks something or is none of RULER's, by row, the first ten at
        once, and when rows are of different kinds.
    """
    made, families, problems = [], {}, []
    for index, row in enumerate(sources.objects(source)):
        try:
            family, prompt = _split(row)
        except ValueError as error:
            problems.append(f"{source}, row {index + 1}: {error}")
        else:
            families.setdefault(family, index + 1)
            made.append(_example(str(index), prompt, FAMILIES[family]))
    if len(families) > 1:
        problems.append(
            f"{source}: rows are of one task, got " + ", ".join(f"{f} (row {i})" for f, i in families.items())
        )
    if problems:
        raise ValueError(files.first_problems(problems))
    [family] = families
    return _task(made, FAMILIES[family])


def _split(row: dict[str, Any]) -> tuple[str, Prompt]:
    """Name of the family and parts of a prepared row."""
    text, gold, prefix = row.get("input"), row.get("outputs"), row.get("answer_prefix", "")
    if not isinstance(text, str) or not isinstance(prefix, str):
        raise ValueError(f"input and answer_prefix must be texts, got {text!r} and {prefix!r}")
    if not isinstance(gold, list) or not gold or not all(isinstance(answer, str) and answer for answer in gold):
        raise ValueError(f"outputs must be a list of texts, got {gold!r}")
    starts = {
        name: max((match.start() for match in family.question.finditer(text)), default=-1)
        for name, family in FAMILIES.items()
    }
    name = max(starts, key=lambda name: starts[name])
    start = starts[name]
    if start < 0:
        raise ValueError("input has no question of RULER's")
    end = len(text) if prefix else text.rfind(FAMILIES[name].answer_prefix, start)
    if end < 0 or "\n" in text[end:]:  # worked examples have questions and answer prefixes too
        raise ValueError("input does not end in an answer prefix, and there is no answer_prefix")
    return name, Prompt(text[:start], text[start:end], prefix or text[end:], tuple(gold))


def _example(name: str, prompt: Prompt, family: Family) -> Example:
    turn = Turn(prompt.question, prompt.gold, family.max_new_tokens, prompt.answer_prefix)
    return Example(name, prompt.context, (turn,))


def _task(examples: list[Example], family: Family) -> Task:
    def score(example: Example, turn: int, answer: str) -> float:
        return string_match(family.metric, example.turns[turn].gold, answer)

    return Task(tuple(examples), family.metric, score, chat=True, source=SOURCE)

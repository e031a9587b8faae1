"""Benchmarks by name. A name is a family, or FAMILY/PART; most are read from the source given with it.

ruler/PART                         parts: `ruler.NAMES`            made for a length; SOURCE: its essay or questions
ruler_rows/PART                           `ruler.NAMES`            SOURCE of prompts that RULER's own code has made
conversation                       facts told early, asked for late    made for a length; SOURCE: the text in between
gsm8k, math500, aime                                               SOURCE, see `data/sources.py`
longbench/PART                            `longbench.NAMES`        SOURCE
longbench_v2/PART                         `longbench_v2.NAMES`     SOURCE
longmemeval/PART                          `longmemeval.NAMES`      SOURCE; answers are graded by a judge
scbench/PART, scbench/MODE/PART           `scbench.NAMES`, `scbench.MODES`, the first of them by default    SOURCE
longproc/PART, longproc/METRIC/PART       `longproc.NAMES`, `longproc.METRICS`, likewise    SOURCE, beside prompts.yaml
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from retention_jax.tasks import (
    conversation,
    judge,
    longbench,
    longbench_v2,
    longmemeval,
    longproc,
    maths,
    ruler,
    scbench,
)
from retention_jax.tasks.example import Task


class Settings(NamedTuple):
    """What tasks are made from beside their names."""

    sources: Mapping[str, str]  # by a task's name or by its family, the name up to the first slash
    judge_url: str
    judge_model: str
    judge_tokens: int  # longest verdict
    verdicts: pathlib.Path  # file that the judge's verdicts are kept in
    limit: int | None  # tasks made for a length: how many examples; None: as many as ruler's authors make, or 100
    seed: int  # tasks made for a length


PARTS = {
    "ruler": ruler.NAMES,
    "ruler_rows": ruler.NAMES,
    "conversation": ("",),
    **{name: ("",) for name in maths.NAMES},
    "longbench": longbench.NAMES,
    "longbench_v2": longbench_v2.NAMES,
    "longmemeval": longmemeval.NAMES,
    "scbench": (*scbench.NAMES, *(f"{mode}/{name}" for mode in scbench.MODES for name in scbench.NAMES)),
    "longproc": (*longproc.NAMES, *(f"{metric}/{name}" for metric in longproc.METRICS for name in longproc.NAMES)),
}


def problems(names: Sequence[str], settings: Settings, others: Sequence[str] = ()) -> list[str]:
    """What is wrong with names and settings, in words; [] where they can be loaded, files apart.

    `others` are tasks that are known besides, and may have sources.
    """
    found = []
    for name in names:
        family, _, part = name.partition("/")
        if family not in PARTS:
            found.append(f"unknown task {name!r}; known: {', '.join((*others, *PARTS))}")
        elif part not in PARTS[family]:
            found.append(f"unknown task {name!r}; {family} has: {', '.join(PARTS[family]) or 'no parts'}")
        elif family != "ruler" and not _source(name, settings):
            found.append(f"task {name!r} needs its questions: --sources={family}=FILE")
        if family == "longmemeval" and not (settings.judge_url and settings.judge_model):
            found.append(f"task {name!r} needs judge_url and judge_model")
    used = {*others, *names, *(name.partition("/")[0] for name in names)}
    unused = [name for name in settings.sources if name not in used]
    return found + [f"sources name {name!r}, which is no task of this run" for name in unused]


def _source(name: str, settings: Settings) -> str:
    return settings.sources.get(name) or settings.sources.get(name.partition("/")[0], "")


# Tokens of an answer, as R-KV has them (arXiv 2505.24133, with the prompt there), and RULER's number of examples.
_MATHS_TOKENS = {"gsm8k": 8192, "math500": 16384, "aime": 32768}
_RULER_EXAMPLES, _CONVERSATIONS = 500, 100


def has_lengths(name: str) -> bool:
    """Whether a task is made for a length; others' texts have lengths of their own."""
    return name.partition("/")[0] in ("ruler", "conversation")


def load(name: str, settings: Settings, encode: Callable[[str], list[int]], length: int) -> Task:
    """A task by its name; `encode`, text to token ids, and `length` in tokens are for tasks that are made for one.

    Raises:
      ValueError: as the family's `load` does.
    """
    family, _, part = name.partition("/")
    source = _source(name, settings)
    match family:
        case "ruler":
            files = {"qa" if part in ruler.LIBRARIES else "haystack": source}
            examples = settings.limit or _RULER_EXAMPLES
            return ruler.load(part, encode=encode, length=length, examples=examples, seed=settings.seed, **files)
        case "conversation":
            examples = settings.limit or _CONVERSATIONS
            return conversation.load(source, encode=encode, length=length, examples=examples, seed=settings.seed)
        case "ruler_rows":
            return ruler.from_rows(source)
        case "gsm8k" | "math500" | "aime":
            return maths.load(family, source, max_new_tokens=_MATHS_TOKENS[family])
        case "longbench":
            return longbench.load(part, source)
        case "longbench_v2":
            return longbench_v2.load(part, source)
        case "longmemeval":
            ask = judge.client(settings.judge_url, settings.judge_model, settings.verdicts, settings.judge_tokens)
            return longmemeval.load(part, source, ask)
        case "scbench":
            mode, _, plain = part.rpartition("/")
            return scbench.load(plain, source, mode or scbench.MODES[0])
        case "longproc":
            metric, _, plain = part.rpartition("/")
            return longproc.load(plain, source, metric or longproc.METRICS[0])
        case _:
            raise ValueError(f"unknown task {name!r}; known families: {', '.join(PARTS)}")

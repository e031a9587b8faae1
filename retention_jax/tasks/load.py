"""Benchmarks by name. A name is a family, or FAMILY/PART; most are read from the source given with it.

longbench/PART                     parts: `longbench.NAMES`        SOURCE, see `data/sources.py`
longbench_v2/PART                         `longbench_v2.NAMES`     SOURCE
longmemeval/PART                          `longmemeval.NAMES`      SOURCE; answers are graded by a judge
scbench/PART, scbench/MODE/PART           `scbench.NAMES`, `scbench.MODES`, the first of them by default    SOURCE
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from retention_jax.tasks import judge, longbench, longbench_v2, longmemeval, scbench
from retention_jax.tasks.example import Task


class Settings(NamedTuple):
    """What tasks are made from beside their names."""

    sources: Mapping[str, str]  # by a task's name or by its family, the name up to the first slash
    judge_url: str
    judge_model: str
    verdicts: pathlib.Path  # file that the judge's verdicts are kept in


PARTS = {
    "longbench": longbench.NAMES,
    "longbench_v2": longbench_v2.NAMES,
    "longmemeval": longmemeval.NAMES,
    "scbench": (*scbench.NAMES, *(f"{mode}/{name}" for mode in scbench.MODES for name in scbench.NAMES)),
}


def problems(names: Sequence[str], settings: Settings) -> list[str]:
    """What is wrong with names and settings, in words; [] where they can be loaded, files apart."""
    found = []
    for name in names:
        family, _, part = name.partition("/")
        if family not in PARTS:
            found.append(f"unknown task {name!r}; known: recall, text, {', '.join(PARTS)}")
        elif part not in PARTS[family]:
            found.append(f"unknown task {name!r}; {family} has: {', '.join(PARTS[family])}")
        elif not _source(name, settings):
            found.append(f"task {name!r} needs its questions: --sources={family}=FILE")
        if family == "longmemeval" and not (settings.judge_url and settings.judge_model):
            found.append(f"task {name!r} needs judge_url and judge_model")
    unused = [n for n in settings.sources if n not in names and n not in {name.partition("/")[0] for name in names}]
    return found + [f"sources name {name!r}, which is no task of this run" for name in unused]


def _source(name: str, settings: Settings) -> str:
    return settings.sources.get(name) or settings.sources.get(name.partition("/")[0], "")


def load(name: str, settings: Settings) -> Task:
    """A task by its name.

    Raises:
      ValueError: as the family's `load` does.
    """
    family, _, part = name.partition("/")
    source = _source(name, settings)
    match family:
        case "longbench":
            return longbench.load(part, source)
        case "longbench_v2":
            return longbench_v2.load(part, source)
        case "longmemeval":
            ask = judge.client(settings.judge_url, settings.judge_model, settings.verdicts)
            return longmemeval.load(part, source, ask)
        case "scbench":
            mode, _, plain = part.rpartition("/")
            return scbench.load(plain, source, mode or scbench.MODES[0])
        case _:
            raise ValueError(f"unknown task {name!r}; known families: {', '.join(PARTS)}")

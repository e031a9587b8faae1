"""The journal of an evaluation: its results so far, as JSON lines on disk, so that a killed run goes on where it was.

Each process appends to a file of its own, `journal-<process>.jsonl`. All processes read all files when they start. A
file's first line says what its results depend on. Each further line is the result of one unit, or the scores of its
answers.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from retention_jax.runtime import files
from retention_jax.runtime.nested import differing


class Unit(NamedTuple):
    """The least that is computed and written down at one time."""

    task: str
    length: int
    policy: str
    budget: int
    seed: int  # sequences: their seed. answers: which sample, from 0
    batch: int  # answers: which batch of examples. sequences: 0


Result = dict[str, Any]  # plain JSON values
_FILES = "journal-*.jsonl"


def read(folder: pathlib.Path, fingerprint: Mapping[str, Any]) -> dict[Unit, Result]:
    """The results of all units that earlier runs wrote into `folder`; without "scores" where these were not written.

    A journal that holds no result yet belongs to no run, whatever its first line says.

    Raises:
      ValueError: when a journal's results depend on something else than `fingerprint`, which says what differs, or when
        a line is damaged; a last line that a crash cut off is not read.
    """
    found: dict[Unit, Result] = {}
    scores: dict[Unit, list[float]] = {}
    ours = json.loads(json.dumps(fingerprint))
    for path in sorted(folder.glob(_FILES)):
        entries = files.read_json_lines(path).values
        for number, entry in enumerate(entries, 1):
            try:
                if isinstance(entry, ValueError):
                    raise entry
                theirs = entry["fingerprint"] if number == 1 else None
                if number > 1 and "scores" in entry:
                    scores.setdefault(Unit(**entry["unit"]), entry["scores"])
                elif number > 1:
                    found.setdefault(Unit(**entry["unit"]), entry["result"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no line of an evaluation's journal: {error}") from None
            if theirs is not None and len(entries) > 1 and (changes := differing(theirs, ours)):
                raise ValueError(
                    f"{folder} holds results of another run; give another --output, or go back to: "
                    + ", ".join(f"{name}={before!r} (now {now!r})" for name, before, now in changes)
                )
    return {u: result | ({"scores": scores[u]} if u in scores else {}) for u, result in found.items()}


class Journal:
    """One process's file, open for more. No other process can open it at the same time."""

    def __init__(self, folder: pathlib.Path, process: int, fingerprint: Mapping[str, Any]) -> None:
        """Drops a torn last line, and a first line with no result behind it. `read` has looked at the file before.

        Raises:
          ValueError: when another process has it open: the same evaluation runs already.
        """
        path = folder / _FILES.replace("*", str(process))
        self._held = contextlib.ExitStack()
        self._held.enter_context(files.locked(path))
        self._file = self._held.enter_context(files.open_json_lines(path))
        if len(files.read_json_lines(path).values) < 2:
            self._file.truncate(0)
            files.append_json_line(self._file, {"fingerprint": fingerprint})

    def write(self, unit: Unit, result: Result) -> None:
        """Returns when the result is on disk."""
        files.append_json_line(self._file, {"unit": unit._asdict(), "result": result})

    def write_scores(self, unit: Unit, scores: list[float]) -> None:
        """Of answers that have been written; returns when they are on disk."""
        files.append_json_line(self._file, {"unit": unit._asdict(), "scores": scores})

    def close(self) -> None:
        self._held.close()

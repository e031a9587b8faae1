"""What of an evaluation is done: JSON lines on disk, so that a killed run goes on where it was.

Each process appends to a file of its own, `journal-<process>.jsonl`; all read all files when they start. A file's first
line says what its results depend on, each further line is the result of one unit, or the scores of its answers.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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

    Raises:
      ValueError: when a journal's results depend on something else than `fingerprint`, which says what differs, or when
        a line but a torn last one is damaged.
    """
    found: dict[Unit, Result] = {}
    scores: dict[Unit, list[float]] = {}
    ours = json.loads(json.dumps(fingerprint))
    for path in sorted(folder.glob(_FILES)):
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line break: nothing, or what a crash left
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                theirs = entry["fingerprint"] if number == 1 else None
                if number > 1 and "scores" in entry:
                    scores.setdefault(Unit(**entry["unit"]), entry["scores"])
                elif number > 1:
                    found.setdefault(Unit(**entry["unit"]), entry["result"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no line of an evaluation's journal: {error}") from None
            if theirs is not None and (changes := differing(theirs, ours)):
                raise ValueError(
                    f"{folder} holds results of another run; give another --output, or go back to: "
                    + ", ".join(f"{name}={before!r} (now {now!r})" for name, before, now in changes)
                )
    return {u: result | ({"scores": scores[u]} if u in scores else {}) for u, result in found.items()}


class Journal:
    """One process's file, open for more."""

    def __init__(self, folder: pathlib.Path, process: int, fingerprint: Mapping[str, Any]) -> None:
        """Drops a torn last line. `read` has looked at the file before."""
        path = folder / _FILES.replace("*", str(process))
        self._file = open(path, "ab")
        whole = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)
        if not whole:
            self._append([{"fingerprint": fingerprint}])

    def write(self, unit: Unit, result: Result) -> None:
        """Returns when the result is on disk."""
        self._append([{"unit": unit._asdict(), "result": result}])

    def write_scores(self, unit: Unit, scores: list[float]) -> None:
        """Of answers that have been written; returns when they are on disk."""
        self._append([{"unit": unit._asdict(), "scores": scores}])

    def _append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

"""Rows of a benchmark's files, checked before any of them is used."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data import sources
from ..runtime import files


def checked_rows(
    source: str, problems: Callable[[dict[str, Any]], list[str]], unique: str | None = None
) -> list[dict[str, Any]]:
    """All rows of a source, in which `problems` finds none, and no two of which are alike in the field `unique`.

    Raises:
      ValueError: as `data.sources.objects` does, and with what is wrong, row by row, the first ten at once.
    """
    rows = sources.objects(source)
    found = [f"{source}, row {number}: {problem}" for number, row in enumerate(rows, 1) for problem in problems(row)]
    if not found and unique is not None:
        seen = {}
        for number, row in enumerate(rows, 1):
            first = seen.setdefault(row[unique], number)
            if first != number:
                found.append(f"{source}, row {number}: has the {unique!r} of row {first}, {row[unique]!r}")
    if found:
        raise ValueError(files.first_problems(found))
    return rows


def lacking(row: Any, fields: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    """What a row lacks of the fields that it needs, by their types: one line a field."""
    if not isinstance(row, dict):
        return [f"must be an object, not {type(row).__name__}"]
    return [
        f"needs {name!r} ({_named(kind)})" + (f", has {type(row[name]).__name__}" if name in row else "")
        for name, kind in fields.items()
        if not isinstance(row.get(name), kind)
    ]


def _named(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def known(name: str, names: Sequence[str], of: str) -> None:
    """Raises a ValueError when a sub-task's name is not one of those that a benchmark has."""
    if name not in names:
        raise ValueError(f"{name!r} is not a task of {of}: it has {', '.join(names)}")

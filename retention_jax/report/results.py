"""What a results folder holds: rows of scores, and traces grouped by what was recorded alike."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retention_jax.evaluation.rows import Row
from retention_jax.report.traces import NEVER, Trace, load


class Results(NamedTuple):
    """A folder's content."""

    run: dict[str, Any]  # header of results.json, {} without one
    rows: list[Row]
    groups: list[list[Trace]]  # traces of one policy, budget, number of recent tokens and shape; each at least one


def read(folder: pathlib.Path) -> Results:
    """Reads results.json and every *.trace.npz; one of the two may be missing.

    Raises:
      ValueError: when there is neither, a row lacks fields or has one of another type, or a file is damaged.
    """
    path, traces = folder / "results.json", sorted(folder.glob("*.trace.npz"))
    if not path.is_file() and not traces:
        raise ValueError(f"{folder}: holds neither results.json nor *.trace.npz")
    run, rows = _read_rows(path) if path.is_file() else ({}, [])
    groups: dict[tuple, list[Trace]] = {}
    for trace in map(load, traces):
        key = (trace.policy, trace.budget, trace.recent, trace.evicted.shape)
        groups.setdefault(key, []).append(trace)
    return Results(run, rows, list(groups.values()))


def _read_rows(path: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows. Older files are a list of rows without a header, or have rows without `options`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    run, rows = (found.get("run", {}), found.get("rows")) if isinstance(found, dict) else ({}, found)
    if not isinstance(rows, list) or not isinstance(run, dict) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path}: must be {{"run": {{...}}, "rows": [{{...}}, ...]}}')
    rows = [{"options": {}} | row for row in rows]
    problems = []
    for i, row in enumerate(rows):
        for name, kind in Row.__annotations__.items():
            if name not in row or not _is_of(row[name], kind):
                problems.append(f"row {i}: {name} must be of type {_TYPES[kind][0]}, got {row.get(name)!r}")
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return run, [Row(**{name: row[name] for name in Row._fields}) for row in rows]


# The types of `Row`'s fields: their names, and what JSON has for them.
_TYPES = {
    str: ("str", (str,)),
    int: ("int", (int,)),
    float: ("float", (int, float)),
    int | None: ("int or null", (int, type(None))),
    dict[str, float]: ("object", (dict,)),
    dict[str, Any]: ("object", (dict,)),
    list[str]: ("list", (list,)),
}


def _is_of(value: object, kind: object) -> bool:
    return isinstance(value, _TYPES[kind][1]) and not isinstance(value, bool)


def kept_by_head(traces: Sequence[Trace]) -> Float[np.ndarray, "L K"]:
    """Entries that each layer and head holds at the end, mean over sequences of one shape."""
    return np.stack([(trace.evicted == NEVER).sum(axis=-1) for trace in traces]).mean(axis=0)


def kept_over_time(
    trace: Trace, bins: int
) -> tuple[Int[np.ndarray, " times"], Int[np.ndarray, " edges"], Float[np.ndarray, "bins times"]]:
    """Which share of the entries at each position is in the buffer, over time, all layers and heads together.

    Args:
      trace: a sequence.
      bins: how many of each axis at most.

    Returns:
      Times, in tokens read: moments after evictions, and the end. Edges of position bins, one more than there are.
      The share kept, of all tokens in a bin; those that are not read yet count as not kept.
    """
    T, R = trace.length, trace.recent
    times = np.minimum(np.unique(-(-np.linspace(0, T, min(bins, T) + 1)[1:] // R).astype(np.int64)) * R, T)
    edges = np.unique(np.linspace(0, T, min(bins, T) + 1).astype(np.int64))
    shape = (len(edges) - 1, len(times) + 1)
    heads = trace.evicted.shape[0] * trace.evicted.shape[1]
    where = np.searchsorted(edges, np.arange(T), side="right") - 1
    count = lambda at, first: np.bincount(at * shape[1] + first, minlength=shape[0] * shape[1]).reshape(shape)
    arrived = heads * count(where, np.searchsorted(times, np.arange(T), side="right"))
    gone = np.zeros(shape, np.int64)
    for evicted in trace.evicted.reshape(heads, T):
        at = evicted != NEVER
        gone += count(where[at], np.searchsorted(times, evicted[at]))
    kept = np.cumsum(arrived - gone, axis=1)[:, :-1]
    return times, edges, kept / (heads * np.diff(edges)[:, None])

"""Charts of scores as numbers in pixels, which the page's template writes as SVG."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from retention_jax.evaluation.rows import Row, in_bytes, lower_is_better, named, number, shown

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 46  # margins around the axes


class Tick(NamedTuple):
    at: float
    label: str


class Point(NamedTuple):
    x: float
    y: float
    low: float  # where the interval ends
    high: float
    title: str  # the numbers, for whoever points at it


class Line(NamedTuple):
    policy: str
    index: int  # of the policy, for its colour and marker
    points: list[Point]  # from left to right


class Panel(NamedTuple):
    """One chart. The full cache is a line across it, with its interval."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    full: Point | None
    full_x: float | None  # where its own point is, if it has one


def quality(rows: Sequence[Row], policies: Sequence[str]) -> Panel:
    """Score against budget, for the rows of one task and length."""
    budgets = sorted({row.budget for row in rows if not row.is_full})
    x_ticks = [(float(budget), str(budget)) for budget in budgets]
    return _panel(
        rows, policies, "kept entries per layer and head", lambda row: float(row.budget), x_ticks, full_has_x=False
    )


def memory(rows: Sequence[Row], policies: Sequence[str]) -> Panel:
    """Score against the bytes held for a sequence, for the rows of one task and length."""
    held = [row.kv_bytes for row in rows]
    least, most = math.floor(math.log2(min(held))), math.ceil(math.log2(max(held)))
    step = max(1, math.ceil((most - least) / 5))
    x_ticks = [(2.0**power, in_bytes(2.0**power)) for power in range(least, most + 1, step)]
    return _panel(rows, policies, "KV memory of a sequence", lambda row: float(row.kv_bytes), x_ticks, full_has_x=True)


def _panel(
    rows: Sequence[Row],
    policies: Sequence[str],
    x_label: str,
    x_of: Callable[[Row], float],
    x_ticks: list[tuple[float, str]],
    *,
    full_has_x: bool,
) -> Panel:
    first = rows[0]
    others = [row for row in rows if not row.is_full]
    full = next((row for row in rows if row.is_full), None)
    xs = [math.log2(x_of(row)) for row in others] + [math.log2(x) for x, _ in x_ticks] or [0.0]
    room = 0.06 * (max(xs) - min(xs)) or 0.5
    to_x = _scale(min(xs) - room, max(xs) + room, LEFT, WIDTH - RIGHT)
    ys = [shown(first.metric, y) for row in rows for y in (row.low, row.high)]
    y_ticks = ticks(min(ys), max(ys)) if lower_is_better(first.metric) else ticks(0.0, min(max(ys), 100.0))
    to_y = _scale(min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    at_y = lambda score: to_y(shown(first.metric, score))

    def point(row: Row, x: float) -> Point:
        interval = f" ({number(row.metric, row.low)} to {number(row.metric, row.high)})" if row.low < row.high else ""
        what = "full cache" if row.is_full else f"{row.policy.replace('_', ' ')}, {row.budget} entries"
        title = f"{what}: {named(row.metric)} {number(row.metric, row.score)}{interval}, {in_bytes(row.kv_bytes)}"
        y, low, high = (round(at_y(score), 1) for score in (row.score, row.low, row.high))
        return Point(round(x, 1), y, low, high, title)

    beside = "" if full is None else f" (full cache {number(full.metric, full.score)})"
    lines = []
    for index, policy in enumerate(policies):
        mine = sorted((row for row in others if row.policy == policy), key=x_of)
        # A small step aside, so that intervals of equal scores do not cover each other.
        aside = min(3.0, 15 / len(policies)) * (index - (len(policies) - 1) / 2)
        points = [point(row, to_x(math.log2(x_of(row))) + aside) for row in mine]
        lines += [Line(policy, index, points)] if points else []
    return Panel(
        title=f"{first.task}, {first.length:,} tokens{beside}",
        x_label=x_label,
        y_label=named(first.metric),
        x_ticks=[Tick(round(to_x(math.log2(x)), 1), label) for x, label in x_ticks],
        y_ticks=[Tick(round(to_y(y), 1), f"{y:g}") for y in y_ticks],
        lines=lines,
        full=None if full is None else point(full, float(WIDTH - RIGHT)),
        full_x=round(to_x(math.log2(x_of(full))), 1) if full is not None and full_has_x else None,
    )


def _scale(low: float, high: float, start: int, end: int) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span the range."""
    raw = (high - low) / 4 or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]

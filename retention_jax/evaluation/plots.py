"""Figures: quality against what is kept, speed against context."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from retention_jax.evaluation.rows import Row, in_bytes, lower_is_better, named, number, shown
from retention_jax.policies.table import FULL

# Colours that the colour-blind can tell apart (Okabe & Ito, https://jfly.uni-koeln.de/color/); markers differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":")


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th of up to 18 lines; no two are alike."""
    again = i // len(COLORS)
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[(i + again) % len(MARKERS)],
        "linestyle": LINES[again % len(LINES)],
    }


def quality(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draws score against budget for the rows of one task, one panel for each length, as a PNG file.

    Error bars are the rows' 95 % intervals; the full cache is a dashed line, and a number in the panel's title.

    Raises:
      ValueError: on no rows, or rows of several tasks.
    """
    budgets = sorted({row.budget for row in rows if not row.is_full})

    def draw(axes: Axes, here: Sequence[Row], policies: Sequence[str]) -> dict[str, Any]:
        axes.set_xlim(*_around(budgets or [row.length for row in here]))
        # A small step aside, so that bars of equal scores do not cover each other.
        step = min(0.05, 0.25 / max(len(policies), 1))
        drawn = {}
        for i, policy in enumerate(policies):
            mine = sorted((row for row in here if row.policy == policy), key=lambda row: row.budget)
            at = [row.budget * 2 ** (step * (i - (len(policies) - 1) / 2)) for row in mine]
            drawn[policy] = _scores(axes, at, mine, line_style(i))
        for full in (row for row in here if row.is_full):
            low, high = (shown(full.metric, x) for x in (full.low, full.high))
            axes.axhspan(low, high, color="0.5", alpha=0.2, linewidth=0)
            drawn[FULL] = axes.axhline(shown(full.metric, full.score), color="black", linestyle="--", linewidth=1.2)
            axes.set_title(f"{full.length} tokens (full cache {number(full.metric, full.score)})", fontsize=10)
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(y=0.12)
        return drawn

    _by_length(rows, path, draw, "budget: kept entries per layer and head", message)


def memory(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draws score against the bytes held for a sequence, one panel for each length of one task, as a PNG file.

    Error bars are the rows' 95 % intervals; the full cache is a point of its own, and a dashed line.

    Raises:
      ValueError: on no rows, or rows of several tasks.
    """

    def draw(axes: Axes, here: Sequence[Row], policies: Sequence[str]) -> dict[str, Any]:
        def line(policy: str, style: dict[str, Any]) -> Any:
            mine = sorted((row for row in here if row.policy == policy), key=lambda row: row.kv_bytes)
            return _scores(axes, [row.kv_bytes for row in mine], mine, style)

        axes.set_xlim(*_around([row.kv_bytes for row in here]))
        drawn = {policy: line(policy, line_style(i)) for i, policy in enumerate(policies)}
        for full in (row for row in here if row.is_full):
            axes.axhline(shown(full.metric, full.score), color="black", linestyle="--", linewidth=1.0)
            drawn[FULL] = line(FULL, {"color": "black", "marker": "*"})
        axes.xaxis.set_major_locator(LogLocator(base=4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: in_bytes(x)))
        return drawn

    title = lambda rows: f"{rows[0].task}: score against memory"
    _by_length(rows, path, draw, "KV memory of a sequence", title)


def curves(
    scored: Sequence[tuple[int, Sequence[Row]]], losses: Sequence[Mapping[str, int | float]], path: str | os.PathLike
) -> None:
    """Draws how scores grow while training, one panel for each task and length, and the losses, as a PNG file.

    A policy that was scored at one step only, because no gate changes it, is a level line.

    Args:
      scored: steps, each with the rows of its evaluation.
      losses: a mapping for each reported step: `step`, and terms of the loss by name.
      path: the file.

    Raises:
      ValueError: when there is nothing to draw.
    """
    panels = list(dict.fromkeys((row.task, row.length) for _, rows in scored for row in rows))
    if not panels:
        raise ValueError("there is no score to draw")
    lines = list(dict.fromkeys((row.policy, row.budget) for _, rows in scored for row in rows if not row.is_full))
    policies, budgets = (list(dict.fromkeys(part)) for part in zip(*lines, strict=True)) if lines else ([], [])
    figure = Figure(figsize=(1.6 + 3.4 * (len(panels) + 1), 4.0), layout="constrained")
    *of_tasks, of_losses = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for (task, length), axes in zip(panels, of_tasks, strict=True):
        at: dict[tuple[str, int], list[tuple[int, Row]]] = {}
        for step, rows in scored:
            for row in rows:
                if (row.task, row.length) == (task, length):
                    at.setdefault((row.policy, -1 if row.is_full else row.budget), []).append((step, row))
        for (policy, budget), points in at.items():
            if policy == FULL:
                style, label = {"color": "black", "linestyle": "--"}, "full cache"
            else:
                style = {"color": COLORS[policies.index(policy) % len(COLORS)]}
                style["linestyle"] = LINES[budgets.index(budget) % len(LINES)]
                style["marker"] = MARKERS[budgets.index(budget) % len(MARKERS)]
                label = f"{policy.replace('_', ' ')}, {budget} kept"
            if len(points) == 1 and len(scored) > 1:
                level = shown(points[0][1].metric, points[0][1].score)
                drawn[label] = axes.axhline(level, **style, linewidth=1.2)
            else:
                drawn[label] = _scores(axes, [step for step, _ in points], [row for _, row in points], style)
        metric = points[0][1].metric
        axes.set_title(f"{task}, {length} tokens", fontsize=10)
        axes.set_ylabel(named(metric))
        if not lower_is_better(metric):
            axes.set_ylim(0, min(max(axes.get_ylim()[1], 1.0), 105.0))  # intervals of a few problems go far beyond
    for i, name in enumerate(("loss", "kl", "ce", "capacity")):
        if points := [(line["step"], line[name]) for line in losses if name in line]:
            of_losses.plot(
                *zip(*points, strict=True), label=name, color=COLORS[i], linewidth=1.2, marker=".", markersize=2
            )
    of_losses.set_title("losses, nats a token", fontsize=10)
    if losses:
        of_losses.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (*of_tasks, of_losses):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Scores while training", fontsize=11, fontweight="bold")
    figure.legend(list(drawn.values()), list(drawn), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=200, format="png")


def _by_length(
    rows: Sequence[Row],
    path: str | os.PathLike,
    draw: Callable[[Axes, Sequence[Row], Sequence[str]], dict[str, Any]],
    x_label: str,
    title: Callable[[Sequence[Row]], str],
) -> None:
    """A panel for each length, which `draw` fills, telling its lines by policy; one legend."""
    if len({row.task for row in rows}) != 1:
        raise ValueError(f"a figure shows the rows of one task, got {sorted({row.task for row in rows})}")
    lengths = sorted({row.length for row in rows})
    policies = list(dict.fromkeys(row.policy for row in rows if not row.is_full))
    figure = Figure(figsize=(max(1.6 + 3.4 * len(lengths), 7.0), 4.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for length, axes in zip(lengths, panels, strict=True):
        axes.set_title(f"{length} tokens", fontsize=10)
        axes.set_xscale("log", base=2)
        drawn |= draw(axes, [row for row in rows if row.length == length], policies)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if not lower_is_better(rows[0].metric):
        # Now that all is drawn: a limit set by hand stops the axis from growing. Where all scores are 0 it ends at 1 %.
        panels[0].set_ylim(0, max(panels[0].get_ylim()[1], 1.0))
    panels[0].set_ylabel(named(rows[0].metric))
    figure.supxlabel(x_label, fontsize=10)
    figure.suptitle(title(rows), fontsize=11, fontweight="bold")
    labels = ["full cache" if policy == FULL else policy.replace("_", " ") for policy in drawn]
    figure.legend(list(drawn.values()), labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=200, format="png")


def _around(values: Sequence[int | float]) -> tuple[float, float]:
    """Limits of a log axis that shows these values, with room on both sides.

    They have to be set before anything is drawn. Around a single value, such as 3, Matplotlib 3.11.2 chooses limits of
    no width, and then it divides by zero.
    """
    return min(values) / 1.3, max(values) * 1.3


def _scores(axes: Axes, at: Sequence[int | float], rows: Sequence[Row], style: dict[str, Any]) -> Any:
    """One line of scores with their intervals."""
    return axes.errorbar(
        at,
        [shown(row.metric, row.score) for row in rows],
        yerr=[
            [shown(row.metric, row.score - row.low) for row in rows],
            [shown(row.metric, row.high - row.score) for row in rows],
        ],
        **style,
        markersize=5,
        capsize=2.5,
        linewidth=1.6,
        elinewidth=1.0,
    )


def message(rows: Sequence[Row]) -> str:
    """What one task's rows say at their greatest length: the first evicting policy at its largest budget, against the
    full cache. Not the best row, which would be a choice made after seeing the numbers.

    "beats" and "falls short" are said only where the two intervals do not overlap.
    """
    length = max(row.length for row in rows)
    here = [row for row in rows if row.length == length]
    fewer_is_better = lower_is_better(here[0].metric)
    evicting = [row for row in here if not row.is_full and row.budget < length]
    full = next((row for row in here if row.is_full), None)
    where = f"{here[0].task} at {length} tokens"
    if not evicting:
        return f"{where}: the full cache"
    first = max((row for row in evicting if row.policy == evicting[0].policy), key=lambda row: row.budget)
    who = f"{first.policy.replace('_', ' ')} with {first.budget} of {length} entries"
    if full is None:
        return f"{where}: {who}\n{named(first.metric)}: {number(first.metric, first.score)}"
    if first.low <= full.high and full.low <= first.high:
        return f"{where}: {who}\nis level with the full cache"
    verb = "beats" if (first.score < full.score) == fewer_is_better else "falls short of"
    gap = abs(shown(first.metric, first.score) - shown(full.metric, full.score))
    by = f"{gap:.3f} {first.metric.replace('_', ' ')}" if fewer_is_better else f"{gap:.1f} points"
    return f"{where}: {who}\n{verb} the full cache by {by}"


class Speed(NamedTuple):
    """One point of a line."""

    label: str
    context: int  # tokens
    tokens_per_second: float


def speed(points: Sequence[Speed], path: str | os.PathLike, title: str) -> None:
    """Draws tokens/s against context, a line for each label, as a PNG file.

    Raises:
      ValueError: on no points, or on speeds that a log axis cannot show.
    """
    if not points:
        raise ValueError("there is no speed to draw")
    if bad := [p for p in points if not 0 < p.tokens_per_second < math.inf]:
        raise ValueError(f"a speed must be positive and finite, got {bad}")
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(*_around([p.context for p in points]))
    axes.set_ylim(*_around([p.tokens_per_second for p in points]))
    for i, label in enumerate(dict.fromkeys(p.label for p in points)):
        line = sorted((p for p in points if p.label == label), key=lambda p: p.context)
        axes.plot(
            [p.context for p in line],
            [p.tokens_per_second for p in line],
            label=label,
            **line_style(i),
            markersize=5,
            linewidth=1.6,
        )
    axes.xaxis.set_major_locator(FixedLocator(sorted({p.context for p in points})))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("context: tokens")
    axes.set_ylabel("tokens/s")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=200, format="png")

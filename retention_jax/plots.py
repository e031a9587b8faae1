"""Figures: quality against what is kept, speed against context."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from retention_jax.evaluation.rows import Row, lower_is_better, named, shown

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

    Error bars are the rows' 95 % intervals; the full cache is a dashed line.

    Raises:
      ValueError: on no rows, or rows of several tasks.
    """
    if len({row.task for row in rows}) != 1:
        raise ValueError(f"a figure shows the rows of one task, got {sorted({row.task for row in rows})}")
    lengths = sorted({row.length for row in rows})
    policies = list(dict.fromkeys(row.policy for row in rows if row.policy != "full"))
    figure = Figure(figsize=(max(1.6 + 3.4 * len(lengths), 7.0), 4.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for length, axes in zip(lengths, panels, strict=True):
        _panel(axes, [row for row in rows if row.length == length], policies)
        axes.set_title(f"{length} tokens", fontsize=10)
    if not lower_is_better(rows[0].metric):
        panels[0].set_ylim(bottom=0)  # now that all is drawn: a limit set by hand stops the axis from growing
    panels[0].set_ylabel(named(rows[0].metric))
    figure.supxlabel("budget: kept entries per layer and head", fontsize=10)
    figure.suptitle(message(rows), fontsize=11, fontweight="bold")
    if policies:
        # The same line in several panels is one entry.
        entries = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            [entries[policy] for policy in policies],
            [policy.replace("_", " ") for policy in policies],
            loc="outside right center",
            frameon=False,
        )
    figure.savefig(path, dpi=200, format="png")


def memory(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draws score against the bytes held for a sequence, one panel for each length of one task, as a PNG file.

    Error bars are the rows' 95 % intervals; the full cache is a point of its own, and a dashed line.

    Raises:
      ValueError: on no rows, or rows of several tasks.
    """
    if len({row.task for row in rows}) != 1:
        raise ValueError(f"a figure shows the rows of one task, got {sorted({row.task for row in rows})}")
    lengths = sorted({row.length for row in rows})
    policies = list(dict.fromkeys(row.policy for row in rows))
    evicting = [policy for policy in policies if policy != "full"]
    figure = Figure(figsize=(max(1.6 + 3.4 * len(lengths), 7.0), 4.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    entries = {}
    for length, axes in zip(lengths, panels, strict=True):
        for policy in policies:
            mine = [row for row in rows if row.length == length and row.policy == policy]
            mine.sort(key=lambda row: row.kv_bytes)
            scores = [shown(row.metric, row.score) for row in mine]
            below = [shown(row.metric, row.score - row.low) for row in mine]
            above = [shown(row.metric, row.high - row.score) for row in mine]
            i = evicting.index(policy) if policy != "full" else None
            if mine and i is None:
                axes.axhline(scores[0], color="black", linestyle="--", linewidth=1.0)
            entries[policy] = axes.errorbar(
                [row.kv_bytes / 2**20 for row in mine],
                scores,
                yerr=[below, above],
                **({"color": "black", "marker": "*"} if i is None else line_style(i)),
                markersize=5,
                capsize=2.5,
                linewidth=1.6,
                elinewidth=1.0,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{length} tokens", fontsize=10)
    panels[0].set_ylabel(named(rows[0].metric))
    figure.supxlabel("KV memory of a sequence (MiB)", fontsize=10)
    figure.suptitle(f"{rows[0].task}: score against memory", fontsize=11, fontweight="bold")
    labels = ["full cache" if policy == "full" else policy.replace("_", " ") for policy in policies]
    figure.legend([entries[policy] for policy in policies], labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=200, format="png")


def _panel(axes: Axes, rows: Sequence[Row], policies: Sequence[str]) -> None:
    budgets = sorted({row.budget for row in rows if row.policy != "full"})
    for i, policy in enumerate(policies):
        mine = sorted((row for row in rows if row.policy == policy), key=lambda row: row.budget)
        if not mine:
            continue
        scores = [shown(row.metric, row.score) for row in mine]
        below = [shown(row.metric, row.score - row.low) for row in mine]
        above = [shown(row.metric, row.high - row.score) for row in mine]
        # A small step aside, so that bars of equal scores do not cover each other.
        step = min(0.05, 0.25 / len(policies))
        at = [row.budget * 2 ** (step * (i - (len(policies) - 1) / 2)) for row in mine]
        axes.errorbar(
            at,
            scores,
            yerr=[below, above],
            label=policy,
            **line_style(i),
            markersize=5,
            capsize=2.5,
            linewidth=1.6,
            elinewidth=1.0,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.12)
    if budgets:
        axes.set_xlim(budgets[0] / 1.3, budgets[-1] * 1.3)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _full_line(axes, rows)


def _full_line(axes: Axes, rows: Sequence[Row]) -> None:
    """The full cache's line, its interval, and its label at the end of the panel that the other scores leave free."""
    full = next((row for row in rows if row.policy == "full"), None)
    if full is None:
        return
    score, low, high = (shown(full.metric, x) for x in (full.score, full.low, full.high))
    axes.axhspan(low, high, color="0.5", alpha=0.2, linewidth=0)
    axes.axhline(score, color="black", linestyle="--", linewidth=1.2)
    others = [row for row in rows if row.policy != "full"]
    distance = lambda budget: min((abs(r.score - full.score) for r in others if r.budget == budget), default=0.0)
    budgets = sorted({row.budget for row in others})
    right = not budgets or distance(budgets[-1]) >= distance(budgets[0])
    mean = sum(row.score for row in others) / len(others) if others else full.score
    axes.annotate(
        f"full cache {score:.1f} %" if not lower_is_better(full.metric) else f"full cache {score:.3f}",
        (0.98 if right else 0.02, score),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3 if full.score >= mean else -3),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom" if full.score >= mean else "top",
        fontsize=9,
    )


def message(rows: Sequence[Row]) -> str:
    """What one task's rows say at their greatest length: the first evicting policy at its largest budget, against the
    full cache. Not the best row, which would be a choice made after seeing the numbers.

    "beats" and "falls short" are said only where the two intervals do not overlap.
    """
    length = max(row.length for row in rows)
    here = [row for row in rows if row.length == length]
    fewer_is_better = lower_is_better(here[0].metric)
    evicting = [row for row in here if row.policy != "full" and row.budget < length]
    full = next((row for row in here if row.policy == "full"), None)
    where = f"{here[0].task} at {length} tokens"
    if not evicting:
        return f"{where}: the full cache"
    first = max((row for row in evicting if row.policy == evicting[0].policy), key=lambda row: row.budget)
    who = f"{first.policy.replace('_', ' ')} with {first.budget} of {length} entries"
    if full is None:
        return f"{where}: {who}"
    if first.low <= full.high and full.low <= first.high:
        return f"{where}: {who} is level with the full cache"
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
      ValueError: on no points.
    """
    if not points:
        raise ValueError("there is no speed to draw")
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(dict.fromkeys(p.label for p in points)):
        line = sorted((p for p in points if p.label == label), key=lambda p: p.context)
        axes.plot(
            [p.context for p in line],
            [p.tokens_per_second for p in line],
            label=label,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=("-", "--", ":")[i // len(COLORS) % 3],
            markersize=5,
            linewidth=1.6,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
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

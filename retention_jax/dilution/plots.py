"""The figure of a dilution sweep: attention off the useful tokens, accuracy, and the margin, against context length."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from retention_jax.evaluation import plots
from retention_jax.evaluation.rows import interval
from retention_jax.policies.table import FULL


class Result(NamedTuple):
    """What one policy with one budget gives at one length."""

    length: int  # tokens a sequence
    policy: str
    budget: int  # M, kept entries per layer and head; the length for the full cache
    accuracy: Float[np.ndarray, " seeds"]  # share of answers right
    dilution: Float[np.ndarray, "seeds L N"]  # mean over queries: attention off what tells of the fact asked for
    off_facts: Float[np.ndarray, "seeds L N"]  # mean over queries: attention off what tells of any fact
    # Medians over the queries of all seeds that see something useful and something else; nan where there are none.
    margin: Float[np.ndarray, "L N"]  # of the useful tokens over the others, as `statements.needed_margin` has it
    crowd: Float[np.ndarray, "L N"]  # other tokens seen for each useful one
    queries: int  # of all seeds

    @property
    def is_full(self) -> bool:
        """Whether everything was kept."""
        return self.policy == FULL


# A line for each budget, the largest solid; a colour and marker for each policy, black for the full cache.
_STYLES = ("-", "--", ":", "-.")


def figure(results: Sequence[Result], path: str | os.PathLike) -> None:
    """Draws dilution and accuracy against context length, the margin against the crowd, and every head, as a PNG file.

    Above: the last layer, mean over its heads; the margin of the full cache and the first evicting policy. Below: each
    layer and query head under each policy's largest budget. Bars are 95 % intervals over seeds.
    """
    layers, heads = results[0].margin.shape
    lines = list(dict.fromkeys((r.policy, r.budget if not r.is_full else 0) for r in results))
    most = max(budget for _, budget in lines)
    shown = Figure(figsize=(12.0, 4.6 + 1.9 * layers), layout="constrained")
    halves: Any = shown.subfigures(2, 1, height_ratios=(4.0, 0.3 + 1.9 * layers))  # typed as one figure, is two
    top, below = halves
    dilution, accuracy, margin = top.subplots(1, 3)
    last = lambda r: r.dilution[:, -1].mean(axis=-1)
    for axes, value, name in (
        (dilution, last, f"dilution, layer {layers - 1}"),
        (accuracy, lambda r: 100 * r.accuracy, "accuracy (%)"),
    ):
        _against_length(axes, results, lines, value)
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.02 if axes is dilution else 102)
        axes.set_xlabel("context length (tokens)")
    first = next((policy for policy, _ in lines if policy != FULL), FULL)
    _margins(margin, [r for r in results if r.is_full or (r.policy, r.budget) == (first, most)], lines)
    margin.set_title(f"layer {layers - 1}, queries that see some of their fact", fontsize=9)
    below.suptitle(f"Dilution by layer and query head, {most} entries kept per layer and head", fontsize=10)
    panels = below.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    widest = [line for line in lines if line[0] == FULL or line[1] == most]
    for layer, row in enumerate(panels):
        for head, axes in enumerate(row):
            _against_length(axes, results, widest, lambda r, at=(layer, head): r.dilution[:, *at], lines)
            axes.set_title(f"layer {layer}, head {head}", fontsize=9)
            axes.set_ylim(0, 1.05)
    below.supxlabel("context length (tokens)", fontsize=10)
    shown.suptitle(message(results), fontsize=11, fontweight="bold")
    handles, labels = dilution.get_legend_handles_labels()
    shown.legend(handles, labels, loc="outside right center", frameon=False)
    shown.savefig(path, dpi=200, format="png")


def message(results: Sequence[Result]) -> str:
    """The first evicting policy at its largest budget beside the full cache, at the greatest length."""
    here = [r for r in results if r.length == max(r.length for r in results)]
    full = next((r for r in here if r.is_full), None)
    others = [r for r in here if not r.is_full]
    if full is None or not others:
        return f"Recall: attention off the fact asked for, up to {here[0].length} tokens"
    one = max((r for r in others if r.policy == others[0].policy), key=lambda r: r.budget)
    dilution, accuracy = (lambda r: r.dilution[:, -1].mean()), (lambda r: 100 * r.accuracy.mean())
    return (
        f"Recall at {one.length} tokens, {one.policy.replace('_', ' ')} with {one.budget} entries against the full "
        f"cache:\ndilution {dilution(one):.2f} against {dilution(full):.2f}, "
        f"accuracy {accuracy(one):.0f} % against {accuracy(full):.0f} %"
    )


def _look(line: tuple[str, int], lines: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Colour, marker and style of a policy with a budget, the same in every panel."""
    policy, budget = line
    policies = list(dict.fromkeys(policy for policy, _ in lines if policy != FULL))
    if policy == FULL:
        return {"color": "black", "marker": "*", "linestyle": "-", "label": "full cache"}
    i, budgets = policies.index(policy), sorted({budget for _, budget in lines if budget}, reverse=True)
    return {
        **plots.line_style(i),
        "linestyle": _STYLES[budgets.index(budget) % len(_STYLES)],
        "label": f"{policy.replace('_', ' ')}, {budget} kept",
    }


def _against_length(
    axes: Axes,
    results: Sequence[Result],
    shown: Sequence[tuple[str, int]],
    value: Callable[[Result], Float[np.ndarray, " seeds"]],
    lines: Sequence[tuple[str, int]] | None = None,
) -> None:
    """A line for each policy and budget in `shown`, out of `lines`; a point for each length, mean over seeds."""
    for line in shown:
        mine = sorted((r for r in results if r.policy == line[0] and line[1] in (0, r.budget)), key=lambda r: r.length)
        middle, low, high = np.array([interval(value(r).tolist()) for r in mine]).T
        axes.errorbar(
            [r.length for r in mine],
            middle,
            yerr=[middle - low, high - middle],
            markersize=4,
            capsize=2,
            linewidth=1.5,
            elinewidth=0.9,
            **_look(line, lines or shown),
        )
    _log_axis(axes, sorted({r.length for r in results}))
    axes.grid(axis="y", color="0.9", linewidth=0.8)


def _margins(axes: Axes, results: Sequence[Result], lines: Sequence[tuple[str, int]]) -> None:
    """Margin against crowd, a point for each length, and the margins that given dilutions need."""
    for policy in dict.fromkeys(r.policy for r in results):
        mine = sorted((r for r in results if r.policy == policy), key=lambda r: r.length)
        line = (policy, 0 if policy == FULL else mine[0].budget)
        crowd, margin = (np.array([np.mean(of(r)[-1]) for r in mine]) for of in (lambda r: r.crowd, lambda r: r.margin))
        axes.plot(crowd, margin, markersize=5, linewidth=1.2, **_look(line, lines))
    low, high = axes.get_xlim()
    crowd = np.geomspace(max(low, 1.0), max(high, 2.0), 50)
    for dilution in (0.1, 0.5, 0.9):
        needed = np.log(crowd * (1 - dilution) / dilution)
        axes.plot(crowd, needed, color="0.55", linewidth=1.0, linestyle=":")
        end = (crowd[-1], needed[-1])
        axes.annotate(
            f"dilution {dilution}", end, (4, 0), textcoords="offset points", va="center", fontsize=8, color="0.35"
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("other tokens seen per useful one")
    axes.set_ylabel("margin (nats); dotted: needed for a dilution")


def _log_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)

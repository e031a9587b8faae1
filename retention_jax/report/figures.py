"""Figures of traces as PNG files: what each head holds, and which positions are still kept over time."""

import os
from collections.abc import Sequence

from matplotlib.figure import Figure

from retention_jax.report import results
from retention_jax.report.traces import Trace

COLOR_MAP = "cividis"  # reads the same with and without colour vision


def heads(traces: Sequence[Trace], path: str | os.PathLike) -> None:
    """Draws the entries that each layer and head holds at the end, mean over sequences, as a PNG file."""
    kept = results.kept_by_head(traces)
    L, K = kept.shape
    figure = Figure(figsize=(max(4.5, 1.8 + 0.55 * K), max(2.6, 1.6 + 0.32 * L)), layout="constrained")
    axes = figure.subplots()
    most = float(kept.max()) or 1.0
    image = axes.imshow(kept, cmap=COLOR_MAP, vmin=0, vmax=most, aspect="auto")
    for layer in range(L):
        for head in range(K):
            dark = kept[layer, head] < most / 2
            axes.text(
                head, layer, f"{kept[layer, head]:.0f}", ha="center", va="center", color="white" if dark else "black"
            )
    axes.set_xticks(range(K))
    axes.set_yticks(range(L))
    axes.set_xlabel("key/value head")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="entries kept")
    figure.suptitle(_title(traces[0], f", mean over {len(traces)} sequences" if len(traces) > 1 else ""), fontsize=10)
    figure.savefig(path, dpi=200, format="png")


def kept(trace: Trace, path: str | os.PathLike) -> None:
    """Draws which positions are kept after so many tokens, all layers and heads together, as a PNG file."""
    times, edges, share = results.kept_over_time(trace, bins=512)
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    axes = figure.subplots()
    starts = [0, *times]
    image = axes.pcolormesh(starts, edges, 100 * share, cmap=COLOR_MAP, vmin=0, vmax=100)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("position of the token")
    figure.colorbar(image, label="layers and heads that keep it (%)")
    figure.suptitle(f"{_title(trace, '')}\n{trace.title}", fontsize=10)
    figure.savefig(path, dpi=200, format="png")


def _title(trace: Trace, more: str) -> str:
    policy = trace.policy.replace("_", " ")
    return f"{policy}, {trace.budget} of {trace.length:,} entries kept per layer and head{more}"

"""The page: one HTML file with its style, its script and all data in it, which asks the network for nothing.

Names of tasks and policies are escaped by the template; what the script reads is JSON in which no `<` is left, and the
script only ever writes it as text. Of a trace the page holds, gzipped: the token names; of each entry a byte for its
half life, on a log scale; and after how many windows it was evicted, 2 bytes, small numbers mostly. 100,000 tokens of
8 heads are 2.4 MB before compression.
"""

import base64
import gzip
import json
import pathlib
from typing import Any, NamedTuple

import jinja2
import matplotlib
import matplotlib.colors
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt16, UInt32
from markupsafe import Markup

from retention_jax.evaluation.rows import in_bytes, number
from retention_jax.report import charts, figures, results
from retention_jax.report.results import Results
from retention_jax.report.traces import NEVER, Trace, half_life

FOREVER = 255  # as a half life's byte: the entry never decays
_HERE = pathlib.Path(__file__).parent


class HalfLives(NamedTuple):
    """Half lives as bytes: log2 of tokens, in even steps."""

    first: float  # log2 of the half life that byte 0 stands for
    step: float
    values: UInt8[np.ndarray, "L K T"]


def quantise(log_beta: Float[np.ndarray, "L K T"]) -> HalfLives:
    """Rounds half lives to 255 values between the shortest and the longest; FOREVER is infinite."""
    logs = np.log2(half_life(log_beta))
    finite = np.isfinite(logs)
    low, high = (float(f(logs[finite])) for f in (np.min, np.max)) if finite.any() else (0.0, 0.0)
    step = (high - low) / (FOREVER - 1) or 1.0
    values = np.where(finite, np.rint((np.where(finite, logs, low) - low) / step), FOREVER)
    return HalfLives(low, step, values.astype(np.uint8))


def windows_kept(trace: Trace) -> UInt16[np.ndarray, "L K T"] | UInt32[np.ndarray, "L K T"]:
    """The eviction that each entry fell to, counted from the first after it arrived, 1; 0 if it never was evicted."""
    which = -(-trace.evicted // trace.recent) - np.arange(trace.length) // trace.recent
    counted = np.where(trace.evicted == NEVER, 0, which)
    return counted.astype(np.uint16 if counted.max(initial=0) < 2**16 else np.uint32)


def shown_heads(trace: Trace, most: int) -> Int[np.ndarray, "n 2"]:
    """Layers and heads of a trace that a page of at most so many entries has room for, spread evenly; at least one."""
    L, K, T = trace.evicted.shape
    count = max(1, min(L * K, most // T))
    chosen = np.unique(np.linspace(0, L * K - 1, count).round().astype(np.int64))
    return np.stack(np.divmod(chosen, K), axis=1)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def trace_data(trace: Trace, most: int) -> dict[str, Any]:
    """What the script is given of a trace. Arrays are little-endian, [shown heads, T]."""
    heads = shown_heads(trace, most)
    layer, head = heads.T
    L, K, T = trace.evicted.shape
    windows = windows_kept(trace)[layer, head]
    data = {
        "title": trace.title,
        "policy": trace.policy.replace("_", " "),
        "budget": trace.budget,
        "recent": trace.recent,
        "length": T,
        "heads": heads.tolist(),
        "all_heads": L * K,
        "names": _packed(json.dumps(trace.names).encode()),
        "window_bytes": windows.itemsize,
        "windows": _packed(windows.astype(windows.dtype.newbyteorder("<")).tobytes()),
        "half_lives": None,
    }
    if trace.log_beta is not None:
        lives = quantise(trace.log_beta[layer, head][None])
        packed = _packed(lives.values.tobytes())
        data["half_lives"] = {"first": lives.first, "step": lives.step, "values": packed}
    return data


class Cell(NamedTuple):
    """Of the table of heads."""

    text: str
    color: str
    ink: str


def heat_table(kept: Float[np.ndarray, "L K"]) -> list[list[Cell]]:
    """Entries of each layer and head, coloured from 0 to the most."""
    palette = matplotlib.colormaps[figures.COLOR_MAP]
    top = kept.max(initial=0) or 1.0
    cell = lambda value: Cell(
        f"{value:,.1f}", matplotlib.colors.to_hex(palette(value / top)), "#000" if value / top > 0.5 else "#fff"
    )
    return [[cell(float(value)) for value in row] for row in kept]


def build(found: Results, title: str, most: int) -> str:
    """The page of a folder's results.

    Args:
      found: at least one row or trace.
      title: the page's heading.
      most: entries of a trace that the token view gets at most, one for each of its layers, heads and tokens; heads are
        left out above that, and the page says so.
    """
    rows = found.rows
    policies = list(dict.fromkeys(row.policy for row in rows if not row.is_full))
    blocks = [
        [row for row in rows if (row.task, row.length) == key]
        for key in dict.fromkeys((r.task, r.length) for r in rows)
    ]
    palette = matplotlib.colormaps[figures.COLOR_MAP](np.arange(256) / 255)
    data = {
        "palette": [matplotlib.colors.to_hex(color) for color in palette],
        "traces": [trace_data(group[0], most) for group in found.groups],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = "".join(
        (_HERE / name).read_text(encoding="utf-8") for name in ("data.js", "kept.js", "tokens.js", "page.js")
    )
    return environment.get_template("page.html").render(
        title=title,
        run=_run_facts(found.run),
        policies=policies,
        charts=charts,
        number=number,
        in_bytes=in_bytes,
        blocks=[(block, charts.quality(block, policies), charts.memory(block, policies)) for block in blocks],
        groups=[(group, heat_table(results.kept_by_head(group))) for group in found.groups],
        data=data,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
    )


def _run_facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """The header's short entries, as they are."""
    facts = [(name, value) for name, value in run.items() if name != "config"]
    text = lambda value: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return [(name.replace("_", " "), text(value)) for name, value in facts]

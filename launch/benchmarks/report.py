"""Tables as they come, and a JSON file that says what a number needs beside it."""

import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from retention_jax.evaluation import plots
from retention_jax.kernels import ops
from retention_jax.runtime import files

from .programs import Row


class Column(NamedTuple):
    header: str
    width: int
    format: str
    scale: float = 1.0


COLUMNS = {
    "batch": Column("batch", 5, "d"),
    "context": Column("context", 8, "d"),
    "budget": Column("budget", 7, "d"),
    "what": Column("what", 28, "<"),
    "pass": Column("pass", 12, "<"),
    "milliseconds": Column("ms", 10, ".3f"),
    "prefill_seconds": Column("prefill s", 10, ".2f"),
    "tokens_per_second": Column("tokens/s", 12, ",.1f"),
    "gigabytes_per_second": Column("GB/s", 9, ".2f"),
    "of_bandwidth": Column("% of copy", 9, ".1f", 100),
    "teraflops": Column("TFLOP/s", 9, ".3f"),
    "of_matmul": Column("% of matmul", 11, ".1f", 100),
    "eviction_milliseconds": Column("eviction ms", 11, ".2f"),
    "of_eviction": Column("% eviction", 10, ".1f", 100),
    "of_mass": Column("% mass", 7, ".1f", 100),
    "import_seconds": Column("import s", 9, ".2f"),
    "load_seconds": Column("load s", 7, ".2f"),
    "first_seconds": Column("1st prompt s", 12, ".2f"),
    "second_seconds": Column("2nd prompt s", 12, ".2f"),
    "kv_bytes": Column("KV MiB", 9, ".2f", 2**-20),
    "gigabytes": Column("GB", 9, ".3f"),
    "gigaflops": Column("GFLOP", 11, ".2f"),
    "bound": Column("bound", 6, "<"),
    "of_roofline": Column("% of roofline", 13, ".1f", 100),
    "of_memory": Column("% of memory", 11, ".1f", 100),
    "temporary_bytes": Column("temp MiB", 9, ".1f", 2**-20),
    "note": Column("", 0, "<"),
}
_RATES = ("milliseconds", "tokens_per_second", "gigabytes_per_second", "of_bandwidth", "teraflops", "of_matmul")
_CELL = ("batch", "context", "what")
TABLES = {
    "decode": (*_CELL, *_RATES, "eviction_milliseconds", "of_eviction", "kv_bytes", "note"),
    "prefill": (*_CELL, *_RATES, "note"),
    "attention": (*_CELL, "pass", *_RATES, "temporary_bytes", "note"),
    "mass": (*_CELL, "pass", *_RATES, "temporary_bytes", "note"),
    "evict": ("batch", "budget", "what", *_RATES[:1], *_RATES[2:4], "temporary_bytes", "note"),
    "train": (*_CELL, *_RATES[:2], *_RATES[4:], "of_mass", "temporary_bytes", "note"),
    "startup": (*_CELL, "import_seconds", "load_seconds", "first_seconds", "second_seconds"),
    "transformers": (*_CELL, "prefill_seconds", "tokens_per_second", "of_bandwidth", "kv_bytes", "note"),
}
_ESTIMATED = ("milliseconds", "gigabytes", "gigaflops", "bound", "of_roofline", "temporary_bytes", "of_memory", "note")


def table(command: str, rows: Iterable[Row], *, estimated: bool) -> list[Row]:
    """Prints each row as it comes, and returns all of them."""
    names = TABLES[command]
    if estimated:
        names = (*(n for n in names if n in ("batch", "context", "budget", "what", "pass")), *_ESTIMATED)
    columns = {name: COLUMNS[name] for name in names}
    print("  ".join(_aligned(c.header, c) for c in columns.values()).rstrip())
    kept = []
    for row in rows:
        kept.append(row)
        print("  ".join(_cell(row.get(name), column) for name, column in columns.items()).rstrip(), flush=True)
    return kept


def _cell(value: Any, column: Column) -> str:
    if value is None or column.format == "<":
        return _aligned(value or "", column)
    return _aligned(format(value if column.format == "d" else value * column.scale, column.format), column)


def _aligned(text: str, column: Column) -> str:
    return text.ljust(column.width) if column.format == "<" else text.rjust(column.width)


def about(arguments: list[str]) -> dict[str, Any]:
    """Device, versions, commit, date and flags."""
    here = pathlib.Path(__file__).parent
    git = lambda *what: subprocess.run(["git", *what], capture_output=True, text=True, cwd=here).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "kernels": ops.implementation(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "python": sys.version.split()[0],
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--short").splitlines(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": arguments,
    }


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    files.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def plot(path: pathlib.Path, rows: Iterable[Row], title: str) -> None:
    """Tokens/s against context, a line for everything else that names a row."""
    points = [
        plots.Speed(
            ", ".join([str(row["what"]), *([str(row["pass"])] if "pass" in row else []), f"batch {row['batch']}"]),
            int(row["context"] or 0),
            float(row["tokens_per_second"] or 0),
        )
        for row in rows
        if "tokens_per_second" in row
    ]
    files.write_atomically(path, lambda temporary: plots.speed(points, temporary, title))

"""Results: one row for each task, length, policy and budget, as a table on the terminal and as JSON."""

import datetime
import functools
import json
import math
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from retention_jax.policies.table import FULL
from retention_jax.runtime import files


class Row(NamedTuple):
    """One result: a policy with a budget on one task at one length."""

    task: str
    length: int  # tokens a sequence; where a task's texts have lengths of their own, of its longest prompt
    policy: str
    budget: int  # M, kept entries per layer and head; the length for the full cache
    metric: str  # "bits_per_byte", "perplexity", "kl": lower is better; all others, such as "accuracy", are shares
    score: float  # mean over seeds (sequences) or problems (answers)
    low: float  # 95 % Student-t interval of that mean; the score itself where it is a mean of one
    high: float
    n: int  # scored tokens (sequences) or problems (answers)
    seeds: int  # sequences: seeds the score is a mean over. answers: 1
    samples: int  # answers: how often each question was answered. sequences: 1
    # Bytes held for one sequence: keys, values and what scores need, in all slots of pool and recent entries. For the
    # full cache it is `full_kv_bytes`, without the room that answers leave unused.
    kv_bytes: int
    full_kv_bytes: int  # keys and values of all tokens of the longest sequence, answers as long as they were
    seconds: float  # for all of it, without compilation
    tokens_per_second: float  # tokens read (sequences) or written (answers), in those seconds
    # Memory of a device that the largest compiled program needs at once, by the compiler's own count: weights, cache
    # and temporaries. None where the platform has no such count.
    peak_bytes: int | None
    groups: dict[str, float]  # mean score of each group of problems; {} where a task has no groups
    cut: int  # problems whose prompts were too long for the model and were cut as the task's authors do
    options: dict[str, Any]  # fields of CacheConfig, beside policy and budget, that the policy ran with
    made_by: list[str]  # every `made_by()` that computed a part of it: a run may go on with other code

    @property
    def is_full(self) -> bool:
        """Whether everything was kept."""
        return self.policy == FULL


_PACKAGES = ("jax", "flax", "retention_jax", "math-verify")
_LOWER = ("bits_per_byte", "perplexity", "kl")


def lower_is_better(metric: str) -> bool:
    return metric in _LOWER


def shown(metric: str, score: float) -> float:
    """The number as tables and figures show it: shares in %, the rest as it is."""
    return score if metric in _LOWER else 100 * score


def number(metric: str, score: float) -> str:
    """The same as text."""
    return f"{shown(metric, score):.{3 if metric in _LOWER else 1}f}"


def in_bytes(count: int | float) -> str:
    """Bytes in the unit that suits them."""
    power = min(int(math.log2(count) // 10), 4) if count >= 1 else 0
    return f"{count / 1024**power:.{3 if power else 4}g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def named(metric: str) -> str:
    """The metric with its unit, for tables and figures."""
    match metric:
        case "bits_per_byte" | "perplexity":
            return f"{metric.replace('_', ' ')}, lower is better"
        case "kl":
            return "KL to the full cache, nats a token, lower is better"
        case "agreement":
            return "% of tokens predicted as by the full cache"
        case "accuracy":
            return "% of answers right"
        case _:
            return f"{metric} in %"


def interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % Student-t interval, mean -+ t(0.975; n - 1) * s / sqrt(n). One score is its own interval.

    For answers, each score is the mean over one problem's questions and samples. Those are not independent of each
    other, so n counts problems (clustered errors, arXiv 2411.00640, section 2.2). Where each problem has one question,
    the mean over problems is pass@1. Where all scores are equal the interval has no width: there are too few of them.
    """
    n, mean = len(scores), float(np.mean(scores))
    half = float(scipy.special.stdtrit(n - 1, 0.975) * np.std(scores, ddof=1) / n**0.5) if n > 1 else 0.0
    return mean, mean - half, mean + half


def table(rows: Sequence[Row]) -> str:
    """The rows of one task and length as text: policies down, budgets across, the full cache on its own line."""
    first, budgets = rows[0], sorted({row.budget for row in rows if not row.is_full})
    found = {(row.policy, row.budget): _cell(row) for row in rows}
    lines = [("kept per layer and head", *map(str, budgets))]
    for policy in dict.fromkeys(row.policy for row in rows if not row.is_full):
        lines.append((policy, *(found.get((policy, budget), "") for budget in budgets)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cut = f"; {first.cut} of {first.n} prompts were too long and are cut" if first.cut else ""
    text = [f"{first.task}, {first.length} tokens: {named(first.metric)}{_spread(first)}{cut}"]
    if budgets:
        text += ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [f"{'full cache'.ljust(widths[0])}  {_cell(row)}" for row in rows if row.is_full]
    return "\n".join(text)


def _spread(row: Row) -> str:
    if row.low == row.high and row.seeds == 1:
        return ""
    over = f"{row.seeds} seeds" if row.seeds > 1 else f"{row.n} problems"
    samples = f", {row.samples} samples each" if row.samples > 1 else ""
    return f", mean ± half the 95 % interval over {over}{samples}"


def _cell(row: Row) -> str:
    score, half = (number(row.metric, x) for x in (row.score, (row.high - row.low) / 2))
    return f"{score} ± {half}" if row.low < row.high else score


def header(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What is true of a whole run: configuration, versions, device, seed, git commit, date.

    The commit is None outside a repository. All of it is about the run that ended last; a row's `made_by` names the
    code that computed it.
    """
    return {
        "config": dict(config),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seed": seed,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def made_by() -> str:
    """The code that computes results now, in one line: git commit, versions, kind of device."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return f"commit {_commit()}, {versions}, {jax.devices()[0].device_kind}"


def _commit() -> str | None:
    """The commit of the repository that this file is in, with `-changed` where tracked files differ from it."""
    folder = pathlib.Path(__file__).parent
    git = lambda *command: subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    try:
        return git("describe", "--always", "--abbrev=40", "--dirty=-changed", "--exclude=*").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save(run: Mapping[str, Any], rows: Sequence[Row], path: pathlib.Path) -> None:
    """Writes {"run": ..., "rows": [...]}, under a temporary name first, so that `path` is never half a file.

    Raises:
      ValueError: when a number is not finite; JSON has no such numbers.
    """
    lines = ",\n".join(json.dumps(row._asdict(), allow_nan=False) for row in rows)
    text = f'{{"run": {json.dumps(run, allow_nan=False)},\n"rows": [\n{lines}\n]}}\n'
    files.write_atomically(path, lambda temporary: temporary.write_text(text))


def load(path: pathlib.Path) -> list[Row]:
    """The rows that `save` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]

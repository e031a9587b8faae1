"""Records what became of every entry of a sequence: its retention score, and when each layer and head evicted it.

    python -m retention_jax.report.trace --config=configs/recall.py --checkpoint=runs/recall \
        --budget=24 --length=768 --output=runs/recall/eval

writes `retention_24_0.trace.npz` into the folder, where `python -m retention_jax.report` finds it beside the results.
The recall task makes sequences of its own; a model of text reads `--text=FILE`, in pieces of `--length` tokens. Options
of the cache are those of the evaluation: `--config.eval.horizon=8`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from retention_jax.config import CacheConfig, TrainConfig, conversion
from retention_jax.data import recall
from retention_jax.evaluation import buffers, command_flags
from retention_jax.models import weights
from retention_jax.report import traces
from retention_jax.runtime import command


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True, flag_values=values)
    text, number = (functools.partial(f, flag_values=values) for f in (flags.DEFINE_string, flags.DEFINE_integer))
    text("checkpoint", "", "Training workdir, or gate folder.")
    text("output", None, "Folder for the traces; that of the results, for one report of both.")
    text("text", "", "UTF-8 file to read; empty for sequences of the recall task.")
    text("policy", CacheConfig.policy, f"One of: {', '.join(buffers.names())}.")
    number("budget", None, "Average kept entries per layer and head.")
    number("recent", None, "Tokens between two evictions; config.eval.recent by default.")
    number("length", None, "Tokens of a sequence; the longest of config.eval.lengths by default.")
    number("sequences", 1, "How many to read, each into a file of its own.")
    number("seed", 0, "Of the recall sequences and of random policies.")
    flags.mark_flags_as_required(["config", "output", "budget"], flag_values=values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = conversion.from_config_dict(TrainConfig, values.config)
    length = values.length if values.length is not None else max(config.eval.lengths)
    recent = values.recent if values.recent is not None else config.eval.recent
    problems = [] if values.sequences >= 1 else [f"--sequences must be at least 1, got {values.sequences}"]
    if length < (least := 1 if values.text else recall.SLOT):
        problems.append(f"--length must be at least {least}, got {length}")
    if not values.text and config.data.task != "recall":
        problems.append(f"--text must name a file for a config whose data.task is {config.data.task!r}")
    chosen = dataclasses.replace(
        config.eval, policies=(values.policy,), budgets=(values.budget,), recent=recent, seed=values.seed
    )
    wrong = buffers.problems(chosen)
    policy = None if wrong else buffers.policy_of(values.policy)
    if policy and policy.needs_future:
        problems.append(f"policy {policy.name!r} must know what comes, which is not given here")
    problems += wrong
    if problems:
        raise ValueError("trace: " + "; ".join(problems))
    cache = buffers.buffer_of(chosen, values.policy, values.budget, length)
    backbone, gates = command_flags.checkpoint_folders(values.checkpoint, config.backbone, [values.policy])
    if values.text:
        texts = traces.file_texts(pathlib.Path(values.text).expanduser(), config, length, values.sequences)
    else:
        texts = traces.recall_texts(length, values.sequences, config.eval.decoys, values.seed)
    model = weights.load(backbone, gates, config.dtype)
    folder = pathlib.Path(values.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        trace = traces.record(model, text.tokens, cache, names=text.names, title=text.title, policy=values.policy)
        traces.save(trace, path := folder / f"{values.policy}_{cache.budget}_{i}.trace.npz")
        print(path)


if __name__ == "__main__":
    command.run(main, define_flags)

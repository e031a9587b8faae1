"""Flags of the commands that run a model under several policies and budgets, and what they say.

Every field of the evaluation is set by `--config.eval.NAME`. What is typed daily has a short name as well.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from retention_jax.config import EvalConfig, TrainConfig, conversion
from retention_jax.evaluation import buffers, plan
from retention_jax.models import gate_files
from retention_jax.parallel import distributed
from retention_jax.runtime import hub

# Short names of fields of EvalConfig.
LISTS = {
    "tasks": f"What is evaluated, out of: {', '.join(plan.FAMILIES)}.",
    "sources": "TASK=FILE, where a task's questions are.",
    "policies": "What chooses the entries to keep.",
    "budgets": "Kept entries per layer and head.",
    "lengths": "Tokens of a sequence.",
}
NUMBERS = {
    "limit": "Only so many problems of each task.",
    "seed": "Of the sequences, of the draws and of random policies.",
    "prefill_chunk": "Tokens of a prompt that are read at a time.",
}
SHORT = (*LISTS, *NUMBERS)


def define(values: flags.FlagValues, short: Sequence[str] = SHORT) -> None:
    """Defines --config, --checkpoint, --output, the short names in `short`, and those of several processes.

    Not at import: `train` imports this room and has a --config of its own.
    """
    config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    text("checkpoint", "", "Training workdir, or gate folder, hub name or builtin:NAME.")
    text("output", "", "Folder for results and figures; empty writes none.")
    for name in short:
        what = (LISTS | NUMBERS)[name] + (f" Out of: {', '.join(buffers.names())}." if name == "policies" else "")
        kind = flags.DEFINE_list if name in LISTS else flags.DEFINE_integer
        kind(name, None, f"In place of config.eval.{name}. {what}", flag_values=values)
    flags.mark_flag_as_required("config", flag_values=values)
    distributed.define_flags(values)


def read(values: flags.FlagValues, short: Sequence[str] = SHORT) -> TrainConfig:
    """The config with the short flags that were given in place of its evaluation's fields.

    Raises:
      ValueError: when a budget or length is not a whole number, and as the config's classes do.
    """
    config = conversion.from_config_dict(TrainConfig, values.config)
    changed = override(config.eval, **{name: values[name].value for name in short})
    return dataclasses.replace(config, eval=changed)


def override(config: EvalConfig, **given: Sequence[str] | int | None) -> EvalConfig:
    """The config with the values that were given (not None) in place of its fields.

    Raises:
      ValueError: when a budget or length is not a whole number, and as EvalConfig does.
    """
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    for name in {"budgets", "lengths"} & changes.keys():
        if bad := [text for text in changes[name] if not text.isdecimal()]:
            raise ValueError(f"--{name} must be whole numbers separated by commas, got {bad[0]!r}")
        changes[name] = tuple(map(int, changes[name]))
    return dataclasses.replace(config, **changes)


def checkpoint_folders(checkpoint: str, backbone: str, policies: Sequence[str]) -> tuple[str, str | None]:
    """Folders of the backbone and of the gates. The gates are None where there are none and no policy needs them.

    Args:
      checkpoint: a gate folder, a training workdir, or "" for none.
      backbone: the config's; where it is "", the run trained its own and left it in the workdir.
      policies: names, as in `buffers.names()`, of what will be run.

    Raises:
      ValueError: when gates or backbone are needed and not there.
    """
    need_gates = [name for name in policies if buffers.uses_gates(name)]
    if not checkpoint:
        if need_gates or not backbone:
            raise ValueError("--checkpoint must name a gate folder or a training workdir")
        return backbone, None
    folder = hub.resolve(checkpoint, files=("config.json", gate_files.OURS, gate_files.OFFICIAL))
    gates = folder if gate_files.weight_files(folder) else folder / "gates"
    has_gates = bool(gate_files.weight_files(gates))
    if need_gates and not has_gates:
        raise ValueError(
            f"{folder}: holds neither gates.safetensors nor gates/; {', '.join(need_gates)} need trained gates"
        )
    return str(hub.resolve(backbone or gates.parent / "backbone")), str(gates) if has_gates else None

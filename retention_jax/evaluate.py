"""Scores a model under every task, length, policy and budget against the full cache, over several seeds.

    python -m retention_jax.evaluate --config=configs/recall.py --checkpoint=runs/recall --output=runs/recall/eval

`--checkpoint` is a training workdir or a gate folder. Sequences go through the buffer as in decoding, so every score
is of a prediction made from what was kept until then; only the full cache is read in one forward pass.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import config_flags

from retention_jax import cache
from retention_jax.config import CacheConfig, DataConfig, EvalConfig, MeshConfig, TrainConfig, conversion
from retention_jax.data import recall, sources
from retention_jax.evaluation import devices, rows, streams, sweep
from retention_jax.evaluation.answers import Answers
from retention_jax.evaluation.rows import Row
from retention_jax.evaluation.streams import TASKS, Streams
from retention_jax.models import gate_files, weights
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import distributed, sharding
from retention_jax.policies import table
from retention_jax.runtime import hub, program_cache
from retention_jax.tasks import load
from retention_jax.tasks.example import Task
from retention_jax.text import tokenizer as tokenizer_lib
from retention_jax.text.tokenizer import Tokenizer

POLICIES = ("full", "retention", "retention_local", *(p for p in table.POLICIES if p != "retention"))


def cache_config(
    policy_name: str, budget: int, recent: int, length: int, seed: int, protect: tuple[int, int] = (0, 0)
) -> CacheConfig:
    """The buffer a policy name stands for.

    Args:
      policy_name: one of `POLICIES`.
      budget: kept entries per layer and head.
      recent: tokens between two evictions.
      length: of the sequences; "full" keeps so many entries, whatever the budget.
      seed: of the random policies. The buffer's configuration is compiled in, so one seed serves all evaluation seeds.
      protect: how many of the first and of the newest tokens stay in every head; "full" keeps all of them anyway.

    Raises:
      ValueError: on an unknown name, and as `CacheConfig` does.
    """
    make = functools.partial(
        CacheConfig, budget=budget, recent=recent, protect_first=protect[0], protect_last=protect[1]
    )
    match policy_name:
        case "full":
            return CacheConfig(budget=length, recent=recent)
        case "retention_local":
            return make(local=True)
        case "random" | "random_keep_prompt":
            return make(policy=policy_name, seed=seed)
        case _ if policy_name in POLICIES:
            return make(policy=policy_name)
        case _:
            raise ValueError(f"unknown policy {policy_name!r}; known: {', '.join(POLICIES)}")


def buffer_of(config: EvalConfig, policy: str, budget: int, length: int) -> CacheConfig:
    """`cache_config` with everything that an evaluation's configuration says."""
    protect = (config.protect_first, config.protect_last)
    return cache_config(policy, budget, config.recent, length, config.seed, protect)


def check(config: EvalConfig, data: DataConfig) -> None:
    """Raises ValueError, naming what is allowed, where the two together cannot be evaluated; asks no device."""
    problems = [] if config.tasks else [f"no task is named; known: {', '.join((*TASKS, *load.PARTS))}"]
    problems += load.problems([t for t in config.tasks if t not in TASKS], _task_settings(config, pathlib.Path()))
    problems += [f"unknown policy {p!r}; known: {', '.join(POLICIES)}" for p in config.policies if p not in POLICIES]
    if "oracle" in config.policies and (answered := [t for t in config.tasks if t not in TASKS]):
        problems.append(
            f"policy 'oracle' must know what comes: not with task {answered[0]!r}, whose answers are written"
        )
    if "random_keep_prompt" in config.policies and (read := [t for t in config.tasks if t in TASKS]):
        problems.append(f"policy 'random_keep_prompt' needs a prompt: task {read[0]!r} has none")
    if "text" in config.tasks and data.task != "text":
        problems.append(f"task 'text' needs a config whose data.task is 'text', got {data.task!r}")
    if "recall" in config.tasks and min(config.lengths) < 3 * recall.SLOT:
        problems.append(f"task 'recall' needs lengths of at least {3 * recall.SLOT}, got {config.lengths}")
    if "perplexity" in config.tasks and "perplexity" not in config.source_of:
        problems.append("task 'perplexity' needs its text: --sources=perplexity=FILE")
    for policy, budget in cells(config, max(config.lengths)):
        try:
            if policy in POLICIES:
                buffer_of(config, policy, budget, max(config.lengths))
        except ValueError as error:
            problems.append(f"{policy} with {budget} entries: {error}")
    if config.seed < 0:
        problems.append(f"seed must not be negative, got {config.seed}")
    if problems:
        raise ValueError("evaluation: " + "; ".join(problems))


def check_mesh(model: Decoder, config: EvalConfig) -> None:
    """Raises ValueError, naming all of it, where a buffer does not fit the mesh that the model is on."""
    problems = []
    with sharding.enter_mesh_of(model):
        rows, heads = (sharding.shards(*axes) for axes in (sharding.ROWS, sharding.HEADS))
        for policy, budget in cells(config, heads):
            buffer = buffer_of(config, policy, budget, heads)
            try:
                jax.eval_shape(functools.partial(cache.empty, model.config, buffer, rows))
            except ValueError as error:
                problems.append(f"{policy} with {budget} entries: {error}")
    if problems:
        raise ValueError("evaluation: " + "; ".join(problems))


def mesh_of(config: MeshConfig) -> Mesh | None:
    """The mesh that this process evaluates on; None for a single device.

    Where each process can hold the whole model, each has a mesh of its own devices, and they share the work.

    Raises:
      ValueError: when the axes do not multiply to the devices there are.
    """
    sizes = config.over(jax.device_count())
    each, left = divmod(sizes["data"], jax.process_count())
    devices, sizes = (jax.devices(), sizes) if left else (jax.local_devices(), sizes | {"data": each})
    return sharding.make_mesh(devices, **sizes) if math.prod(sizes.values()) > 1 else None


def cells(config: EvalConfig, length: int) -> list[tuple[str, int]]:
    """Policy and budget of every row of one task and length. The full cache is one row."""
    full = [("full", length)] if "full" in config.policies else []
    return full + [(policy, budget) for policy in config.policies if policy != "full" for budget in config.budgets]


def run(
    model: Decoder,
    config: EvalConfig,
    data: DataConfig,
    output: pathlib.Path | None,
    tokenizer: Tokenizer | None = None,
) -> list[Row]:
    """Evaluates everything the config names and prints a table for each task and length as soon as it is known.

    A run that was killed goes on where it was: finished units are read from journals in `output`. Several processes
    that each hold the whole model share the work; a model that lies across them is run by all together. The model may
    lie on a mesh: its axes `data` and `fsdp` then share sequences and prompts out.

    Args:
      model: backbone and gates.
      config: tasks, lengths, policies, budgets, seeds.
      data: where task "text" has its held-out text.
      output: folder for journals, `results.json` and `quality_<task>.png`; None writes nothing.
      tokenizer: for tasks with answers; the two streams need none.

    Raises:
      ValueError: as `check`, loading a task and `journal.read` do, and when the model's vocabulary is too small.
    """
    check(config, data)
    check_mesh(model, config)
    settings = {"eval": conversion.to_dict(config), "data": conversion.to_dict(data)}
    # A unit says which task, length, policy and budget it is of, so that a run with more of them goes on from this one;
    # and each result says which texts it is of. A judge may listen elsewhere than before.
    of_units = ("tasks", "lengths", "policies", "budgets", "sources", "judge_url")
    shared = {name: value for name, value in settings["eval"].items() if name not in of_units}
    return sweep.run(
        blocks(model, config, data, output, tokenizer),
        lambda length: cells(config, length),
        functools.partial(buffer_of, config),
        header=rows.header(settings, config.seed),
        fingerprint={"eval": shared, "model": devices.digest(model)},
        output=output,
        alone=devices.is_own(model),
    )


def blocks(
    model: Decoder, config: EvalConfig, data: DataConfig, output: pathlib.Path | None, tokenizer: Tokenizer | None
) -> list[Callable[[], sweep.Block]]:
    """Functions that make every task at every length; a task whose texts have lengths of their own once.

    Sources are read here, so that a wrong one shows at once; prompts are in memory while their task and length runs.

    Raises:
      ValueError: naming every task that cannot be loaded.
    """
    found, problems, compile_stream = [], [], streams.remembering(model)
    settings = _task_settings(config, (output or pathlib.Path()) / f"verdicts-{jax.process_index()}.jsonl")
    for task in config.tasks:
        try:
            if tokenizer is None and task not in ("recall", "text"):
                raise ValueError(f"task {task!r} needs the model's tokenizer")
            if task in TASKS:
                if task == "perplexity":
                    sources.text(config.source_of[task])
                else:
                    for length in config.lengths:
                        streams.examples(task, config, data, length)
                make = functools.partial(
                    Streams, model, config, data, task, tokenizer=tokenizer, compile_stream=compile_stream
                )
                found += [functools.partial(make, length=length) for length in config.lengths]
            elif tokenizer is not None:
                encode = functools.partial(tokenizer.encode, bos=False)
                for length in config.lengths if load.has_lengths(task) else (None,):
                    loaded = functools.partial(load.load, task, encode=encode, length=length or 0)
                    loaded(settings=settings._replace(limit=1))  # of a task that is made here, one prompt
                    of_task = functools.partial(loaded, settings=settings)
                    found.append(functools.partial(_answers, model, tokenizer, config, task, of_task, length))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _answers(
    model: Decoder,
    tokenizer: Tokenizer,
    config: EvalConfig,
    task: str,
    of_task: Callable[[], Task],
    length: int | None,
) -> Answers:
    return Answers(model, tokenizer, config, task, of_task(), length)


def _task_settings(config: EvalConfig, verdicts: pathlib.Path) -> load.Settings:
    return load.Settings(
        sources=config.source_of,
        judge_url=config.judge_url,
        judge_model=config.judge_model,
        judge_tokens=config.judge_tokens,
        verdicts=verdicts,
        limit=config.limit,
        seed=config.seed,
    )


# Flags that stand in for a field of EvalConfig, by what the flag holds.
LISTS = ("tasks", "policies", "budgets", "lengths", "sources")
NUMBERS = ("seed", "samples", "limit", "batch_size", "max_new_tokens", "context", "prefill_chunk")
REALS = ("temperature", "top_p")
SWITCHES = ("query_aware",)


def override(config: EvalConfig, **given: Sequence[str] | int | float | None) -> EvalConfig:
    """The config with the flags that were given (not None) in place of its fields.

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
    """Where backbone and gates are; the gates are None where there are none and no policy asks for them.

    Args:
      checkpoint: a gate folder, a training workdir, or "" for none.
      backbone: the config's; where it is "", the run trained its own and left it in the workdir.
      policies: what will be evaluated.

    Raises:
      ValueError: when gates or backbone are needed and not there.
    """
    needs_gates = any(policy.startswith("retention") for policy in policies)
    if not checkpoint:
        if needs_gates or not backbone:
            raise ValueError("--checkpoint must name a gate folder or a training workdir")
        return backbone, None
    folder = hub.resolve(checkpoint)
    gates = folder if gate_files.weight_files(folder) else folder / "gates"
    has_gates = bool(gate_files.weight_files(gates))
    if needs_gates and not has_gates:
        raise ValueError(
            f"{folder}: holds neither gates.safetensors nor gates/; policies 'retention*' need trained gates"
        )
    return str(hub.resolve(backbone or gates.parent / "backbone")), str(gates) if has_gates else None


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: `train` imports this module and has a --config of its own."""
    config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    several = functools.partial(flags.DEFINE_list, default=None, flag_values=values)
    text("checkpoint", "", "Training workdir, or gate folder.")
    text("output", "", "Folder for results.json and figures; empty writes none.")
    several("tasks", help=f"In place of config.eval.tasks, out of: {', '.join((*TASKS, *load.PARTS))}.")
    several("policies", help=f"In place of config.eval.policies, out of: {', '.join(POLICIES)}.")
    several("budgets", help="In place of config.eval.budgets: kept entries per layer and head.")
    several("lengths", help="In place of config.eval.lengths: tokens a sequence.")
    several("sources", help="In place of config.eval.sources: TASK=FILE, where a task's questions are.")
    for name in NUMBERS:
        flags.DEFINE_integer(name, None, f"In place of config.eval.{name}.", flag_values=values)
    for name in REALS:
        flags.DEFINE_float(name, None, f"In place of config.eval.{name}.", flag_values=values)
    for name in SWITCHES:
        flags.DEFINE_bool(name, None, f"In place of config.eval.{name}.", flag_values=values)
    flags.mark_flag_as_required("config", flag_values=values)
    distributed.define_flags(values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = conversion.from_config_dict(TrainConfig, values.config)
    chosen = override(config.eval, **{n: values[n].value for n in (*LISTS, *NUMBERS, *REALS, *SWITCHES)})
    check(chosen, config.data)
    output = pathlib.Path(values.output).expanduser() if values.output else None
    with distributed.joined(values):
        distributed.agree_on(
            "configurations", {"config": conversion.to_dict(config), "eval": conversion.to_dict(chosen)}
        )
        backbone, gates = checkpoint_folders(values.checkpoint, config.backbone, chosen.policies)
        # Before the weights: what is wrong with it shows at once.
        has_text = any(task not in ("recall", "text") for task in chosen.tasks)
        tok = tokenizer_lib.load(hub.resolve(backbone)) if has_text else None
        model = weights.load(backbone, gates, config.dtype, mesh=mesh_of(config.mesh))
        run(model, chosen, config.data, output, tok)


if __name__ == "__main__":
    jax.config.config_with_absl()
    program_cache.keep_programs()
    define_flags(flags.FLAGS)
    app.run(main)

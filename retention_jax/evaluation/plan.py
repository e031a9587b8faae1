"""What an evaluation does: its configuration checked, its tasks made, its units computed."""

import functools
import math
import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from retention_jax import cache
from retention_jax.config import DataConfig, EvalConfig, MeshConfig, conversion
from retention_jax.corpus.answers import read_prompts
from retention_jax.data import recall, sources
from retention_jax.evaluation import buffers, devices, faithfulness, rows, sequences, sweep
from retention_jax.evaluation.answers import Answers
from retention_jax.evaluation.buffers import buffer_of, cells
from retention_jax.evaluation.faithfulness import Faithfulness
from retention_jax.evaluation.rows import Row
from retention_jax.evaluation.sequences import TASKS, Sequences
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding
from retention_jax.tasks import load
from retention_jax.tasks.example import Task
from retention_jax.text.tokenizer import Tokenizer

FAMILIES = (*TASKS, faithfulness.TASK, *load.PARTS)  # of tasks


def check(config: EvalConfig, data: DataConfig) -> None:
    """Checks everything that needs no model and no device.

    Raises:
      ValueError: naming all that is wrong, and what is allowed.
    """
    problems = [] if config.tasks else [f"no task is named; known: {', '.join(FAMILIES)}"]
    answered = [task for task in config.tasks if task not in TASKS]
    read = [task for task in config.tasks if task in TASKS]
    loaded = [task for task in answered if task != faithfulness.TASK]
    problems += load.problems(loaded, _task_settings(config, pathlib.Path()), others=(*TASKS, faithfulness.TASK))
    for name in config.policies:
        policy = buffers.policy_of(name) if name in buffers.names() else None
        if policy and policy.needs_future and answered:
            problems.append(
                f"policy {name!r} must know what comes: not with task {answered[0]!r}, whose answers are written"
            )
        if policy and policy.needs_prompt and read:
            problems.append(f"policy {name!r} needs a prompt: task {read[0]!r} has none")
    if "text" in config.tasks and data.task != "text":
        problems.append(f"task 'text' needs a config whose data.task is 'text', got {data.task!r}")
    if "recall" in config.tasks and min(config.lengths) < 3 * recall.SLOT:
        problems.append(f"task 'recall' needs lengths of at least {3 * recall.SLOT}, got {config.lengths}")
    for task, what in (("perplexity", "text"), (faithfulness.TASK, "prompts")):
        if task in config.tasks and task not in config.source_of:
            problems.append(f"task {task!r} needs its {what}: --sources={task}=FILE")
    problems += buffers.problems(config)
    if config.seed < 0:
        problems.append(f"seed must not be negative, got {config.seed}")
    if problems:
        raise ValueError("evaluation: " + "; ".join(problems))


def check_mesh(model: Decoder, config: EvalConfig) -> None:
    """Raises ValueError, naming every policy and budget whose buffer does not fit the mesh that the model is on."""
    problems = []
    with sharding.enter_mesh_of(model):
        parts, heads = (sharding.shards(*axes) for axes in (sharding.ROWS, sharding.HEADS))
        for name, budget in cells(config, heads):
            buffer = buffer_of(config, name, budget, heads)
            try:
                cache.shapes(model.config, buffer, parts)
            except ValueError as error:
                problems.append(f"{name} with {budget} entries: {error}")
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
    found, sizes = (jax.devices(), sizes) if left else (jax.local_devices(), sizes | {"data": each})
    return sharding.make_mesh(found, **sizes) if math.prod(sizes.values()) > 1 else None


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
    lie on a mesh: its axes `data` and `fsdp` then cut batches of sequences and prompts.

    Args:
      model: backbone and gates.
      config: tasks, lengths, policies, budgets, seeds, options of the cache.
      data: where task "text" has its held-out text.
      output: folder for journals, `results.json` and `quality_<task>.png`; None writes nothing.
      tokenizer: for tasks of text; "recall" and "text" need none.

    Raises:
      ValueError: as `check`, loading a task and `journal.read` do, and when the model's vocabulary is too small.
    """
    check(config, data)
    check_mesh(model, config)
    settings = {"eval": conversion.to_dict(config), "data": conversion.to_dict(data)}
    # A run with more tasks, lengths, policies or budgets goes on from this one: each unit names its own. Each result
    # also says which texts it is of, wherever they were read. A judge may have moved to another address.
    of_units = ("tasks", "lengths", "policies", "budgets", "sources", "judge_url")
    of_all = {name: value for name, value in settings["eval"].items() if name not in of_units}
    return sweep.run(
        blocks(model, config, data, output, tokenizer),
        functools.partial(cells, config),
        functools.partial(buffer_of, config),
        header=rows.header(settings, config.seed),
        fingerprint={"eval": of_all, "model": devices.digest(model)},
        output=output,
        alone=devices.is_own(model),
    )


def blocks(
    model: Decoder, config: EvalConfig, data: DataConfig, output: pathlib.Path | None, tokenizer: Tokenizer | None
) -> list[Callable[[], sweep.Block]]:
    """Functions that make every task at every length. A task whose texts have lengths of their own is made once.

    Sources are read here, so that a wrong one shows at once; prompts are in memory while their task and length runs.

    Raises:
      ValueError: as `check_sources` does.
    """
    check_sources(config, data, tokenizer)
    found, compile_programs = [], sequences.compile_once(model)
    settings = _task_settings(config, (output or pathlib.Path()) / f"verdicts-{jax.process_index()}.jsonl")
    for task in config.tasks:
        if task in TASKS:
            make = functools.partial(
                Sequences, model, config, data, task, tokenizer=tokenizer, compile_programs=compile_programs
            )
            found += [functools.partial(make, length=length) for length in config.lengths]
        elif tokenizer is not None and task == faithfulness.TASK:
            found.append(functools.partial(Faithfulness, model, tokenizer, config))
        elif tokenizer is not None:
            for length in _lengths(config, task):
                make_task = functools.partial(_load, task, tokenizer, length, settings)
                found.append(functools.partial(_answers, model, tokenizer, config, task, make_task, length))
    return found


def check_sources(config: EvalConfig, data: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Reads every source, and makes a prompt of every task and length. It needs no model.

    Raises:
      ValueError: naming every task that cannot be loaded.
    """
    problems, settings = [], _task_settings(config, pathlib.Path())._replace(limit=1)
    for task in config.tasks:
        try:
            if tokenizer is None and needs_tokenizer(task):
                raise ValueError(f"task {task!r} needs the model's tokenizer")
            if task == "perplexity":
                sources.text(config.source_of[task])
            elif task == faithfulness.TASK:
                read_prompts(config.source_of[task])
            elif task in TASKS:
                for length in config.lengths:
                    sequences.examples(task, config, data, length)
            elif tokenizer is not None:
                for length in _lengths(config, task):
                    _load(task, tokenizer, length, settings)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _lengths(config: EvalConfig, task: str) -> tuple[int | None, ...]:
    """What a task with answers is made for; None where its texts have lengths of their own."""
    return config.lengths if load.has_lengths(task) else (None,)


def _load(task: str, tokenizer: Tokenizer, length: int | None, settings: load.Settings) -> Task:
    return load.load(task, settings, functools.partial(tokenizer.encode, bos=False), length or 0)


def needs_tokenizer(task: str) -> bool:
    """Whether a task's texts become tokens by the model's tokenizer."""
    return task not in ("recall", "text")


def _answers(
    model: Decoder,
    tokenizer: Tokenizer,
    config: EvalConfig,
    task: str,
    make_task: Callable[[], Task],
    length: int | None,
) -> Answers:
    return Answers(model, tokenizer, config, task, make_task(), length)


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

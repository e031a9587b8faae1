"""Scores a model under every task, length, policy and budget against the full cache, over several seeds.

    python -m retention_jax.evaluate --config=configs/recall.py --checkpoint=runs/recall --output=runs/recall/eval

`--checkpoint` is a training workdir or a gate folder. Sequences go through the buffer as in decoding, so every score
is of a prediction made from what was kept until then; only the full cache is read in one forward pass.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import time
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import tqdm
from absl import app, flags
from jaxtyping import Array, Bool, Float, Int
from ml_collections import config_flags

from retention_jax import checkpoint, config_io, distributed, files, plots, program_cache
from retention_jax.config import CacheConfig, DataConfig, EvalConfig, Policy, TrainConfig
from retention_jax.data import pipeline
from retention_jax.decoding import Scores, compile_score_stream
from retention_jax.models import decoder, gate_files, weights
from retention_jax.models.decoder import Decoder
from retention_jax.plots import Row
from retention_jax.tasks import recall

TASKS = ("recall", "text")
POLICIES = ("full", "retention_local", *typing.get_args(Policy))

_LOGITS_BLOCK = 4096  # tokens whose vocabulary logits exist at one time, in the full cache's forward pass


def cache_config(policy_name: str, budget: int, recent: int, length: int, seed: int) -> CacheConfig:
    """The buffer a policy name stands for.

    Args:
      policy_name: one of `POLICIES`.
      budget: kept entries per layer and head.
      recent: tokens between two evictions.
      length: of the sequences; "full" keeps so many entries, whatever the budget.
      seed: of the random policy. The buffer's configuration is compiled in, so one seed serves all evaluation seeds.

    Raises:
      ValueError: on an unknown name.
    """
    match policy_name:
        case "full":
            return CacheConfig(budget=length, recent=recent)
        case "retention_local":
            return CacheConfig(budget=budget, recent=recent, local=True)
        case _ if policy_name in POLICIES:
            return CacheConfig(budget=budget, recent=recent, policy=typing.cast(Policy, policy_name), seed=seed)
        case _:
            raise ValueError(f"unknown policy {policy_name!r}; known: {', '.join(POLICIES)}")


def check(config: EvalConfig, data: DataConfig) -> None:
    """Raises ValueError, naming what is allowed, where the two together cannot be evaluated."""
    problems = [] if config.tasks else [f"no task is named; known: {', '.join(TASKS)}"]
    problems += [f"unknown task {t!r}; known: {', '.join(TASKS)}" for t in config.tasks if t not in TASKS]
    problems += [f"unknown policy {p!r}; known: {', '.join(POLICIES)}" for p in config.policies if p not in POLICIES]
    if "text" in config.tasks and data.task != "text":
        problems.append(f"task 'text' needs a config whose data.task is 'text', got {data.task!r}")
    if "recall" in config.tasks and min(config.lengths) < 3 * recall.SLOT:
        problems.append(f"task 'recall' needs lengths of at least {3 * recall.SLOT}, got {config.lengths}")
    if config.seed < 0:
        problems.append(f"seed must not be negative, got {config.seed}")
    if problems:
        raise ValueError("evaluation: " + "; ".join(problems))


def examples(
    task: str, config: EvalConfig, data: DataConfig, length: int
) -> tuple[Int[np.ndarray, "seeds n T"], Bool[np.ndarray, "seeds n T"]]:
    """Sequences of `length` tokens for each seed, and which of their tokens are scored.

    recall: `config.examples` new streams a seed. text: rows of the held-out tail, shuffled by the first seed and dealt
    out, so that no two seeds share a row; fewer than `config.examples` each where the tail is short.

    Raises:
      ValueError: when the text has fewer rows than there are seeds, or as `pipeline.heldout_rows` does.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    if task == "recall":
        # Training streams end their seeds in a third word (data/builders.py): these are never among them.
        streams = [
            [recall.stream(np.random.default_rng((seed, i)), length, config.decoys) for i in range(config.examples)]
            for seed in seeds
        ]
        tokens, label_mask = (np.array([[s[field] for s in group] for group in streams]) for field in (0, 1))
        return tokens, label_mask
    rows = pipeline.heldout_rows(data, length=length, limit=None)
    n = min(config.examples, len(rows) // config.seeds)
    if n == 0:
        raise ValueError(f"{data.path}: {len(rows)} held-out rows of {length} tokens, too few for {config.seeds} seeds")
    chosen = np.random.default_rng(config.seed).permutation(len(rows))[: config.seeds * n]
    tokens = rows[chosen].reshape(config.seeds, n, length)
    return tokens, np.ones_like(tokens, bool)


def accuracy(
    best: Int[np.ndarray, "n T_less_1"], tokens: Int[np.ndarray, "n T"], label_mask: Bool[np.ndarray, "n T"]
) -> float:
    """Share of the labelled tokens that were predicted. Column t of `best` predicts token t + 1."""
    return float(np.mean((best == tokens[:, 1:])[label_mask[:, 1:]]))


def bits_per_byte(log_prob: Float[np.ndarray, "n T_less_1"], label_mask: Bool[np.ndarray, "n T"]) -> float:
    """Mean -log2 of the labelled tokens' probabilities, whose natural logs are given; a token is a byte."""
    return float(np.mean(-log_prob[label_mask[:, 1:]], dtype=np.float64) / np.log(2))


def interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % Student-t interval, mean -+ t(0.975; n - 1) * s / sqrt(n). One score is its own interval."""
    n, mean = len(scores), float(np.mean(scores))
    half = float(scipy.special.stdtrit(n - 1, 0.975) * np.std(scores, ddof=1) / n**0.5) if n > 1 else 0.0
    return mean, mean - half, mean + half


@jax.jit
def score_full(model: Decoder, tokens: Int[Array, "B T"]) -> Scores:
    """The scores of `score_stream` with a cache that keeps everything: one forward pass, ordinary attention."""
    hidden, _ = decoder.forward(model, tokens, jnp.ones_like(tokens), with_retention=False)

    def one_token(token: tuple[Float[Array, " D"], Int[Array, ""]]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        log_probs = jax.nn.log_softmax(decoder.unembed(model, token[0]))
        return log_probs[token[1]], jnp.argmax(log_probs).astype(jnp.int32)

    flat = (hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1))
    by_row = lambda a: a.reshape(tokens.shape[0], tokens.shape[1] - 1)
    return Scores(*map(by_row, jax.lax.map(one_token, flat, batch_size=_LOGITS_BLOCK)))


def _compile(
    model: Decoder, config: EvalConfig, policy: str, budget: int, tokens: Int[np.ndarray, "seeds n T"]
) -> Callable[[], tuple[Scores, int]]:
    """Compiles one policy and budget into a function that scores all rows and tells the bytes held for one of them."""
    seeds, n, T = tokens.shape
    if policy == "full":
        one_seed = score_full.lower(model, tokens[0]).compile()
        # One seed at a time: the forward pass holds every token's activations, the buffer does not.
        scores = lambda: Scores(*map(jnp.concatenate, zip(*(one_seed(model, group) for group in tokens), strict=True)))
        return lambda: (jax.block_until_ready(scores()), full_kv_bytes(model, T))
    flat, lengths = tokens.reshape(seeds * n, T), np.full(seeds * n, T, np.int32)
    cache = cache_config(policy, budget, config.recent, T, config.seed)
    all_seeds = compile_score_stream(model, flat, cache, lengths)

    def score() -> tuple[Scores, int]:
        scores, buffer = jax.block_until_ready(all_seeds(model, flat, lengths))
        return scores, buffer.nbytes // (seeds * n)

    return score


def full_kv_bytes(model: Decoder, length: int) -> int:
    """Bytes of the keys and values of one sequence in all layers and heads."""
    cfg = model.config
    return cfg.num_layers * cfg.num_kv_heads * length * 2 * cfg.head_size * jnp.dtype(cfg.dtype).itemsize


def cells(config: EvalConfig, length: int) -> list[tuple[str, int]]:
    """Policy and budget of every row of one task and length. The full cache is one row."""
    full = [("full", length)] if "full" in config.policies else []
    return full + [(policy, budget) for policy in config.policies if policy != "full" for budget in config.budgets]


def _rows(
    model: Decoder, config: EvalConfig, data: DataConfig, task: str, length: int, progress: tqdm.tqdm
) -> list[Row]:
    """All rows of one task and length."""
    tokens, label_mask = examples(task, config, data, length)
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(f"task {task!r} has token {tokens.max()}; the model's vocabulary is {model.config.vocab_size}")
    here, scorers, rows = cells(config, length), [], []
    # Compiling takes longer than running for a small model, and uses one core; several at once use all.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda cell: _compile(model, config, cell[0], cell[1], tokens), here)
        for (policy, budget), scorer in zip(here, compiled, strict=True):
            progress.set_description(f"{task} {length}: compiling {policy} {budget}")
            scorers.append(scorer)
            progress.update()
    for (policy, budget), scorer in zip(here, scorers, strict=True):
        progress.set_description(f"{task} {length}: {policy} {budget}")
        started = time.perf_counter()
        scores, kv_bytes = scorer()
        seconds = time.perf_counter() - started
        rows.append(
            _row(task, policy, budget, scores, tokens, label_mask, kv_bytes, full_kv_bytes(model, length), seconds)
        )
        progress.update()
    return rows


def _row(
    task: str,
    policy: str,
    budget: int,
    scores: Scores,
    tokens: Int[np.ndarray, "seeds n T"],
    label_mask: Bool[np.ndarray, "seeds n T"],
    kv_bytes: int,
    full_bytes: int,
    seconds: float,
) -> Row:
    best, log_prob = (np.asarray(a).reshape(*tokens.shape[:2], -1) for a in (scores.best, scores.log_prob))
    if task == "recall":
        metric, by_seed = "accuracy", [accuracy(*a) for a in zip(best, tokens, label_mask, strict=True)]
    else:
        metric, by_seed = "bits_per_byte", [bits_per_byte(*a) for a in zip(log_prob, label_mask, strict=True)]
    score, low, high = interval(by_seed)
    return Row(
        task=task,
        length=tokens.shape[-1],
        policy=policy,
        budget=budget,
        metric=metric,
        score=score,
        low=low,
        high=high,
        n=int(label_mask[..., 1:].sum()),
        seeds=len(by_seed),
        kv_bytes=kv_bytes,
        full_kv_bytes=full_bytes,
        seconds=seconds,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows of one task and length as text: policies down, budgets across, the full cache on its own line."""
    first, budgets = rows[0], sorted({row.budget for row in rows if row.policy != "full"})
    unit = "% of answers right" if first.metric == "accuracy" else "bits per byte, lower is better"
    spread = f", mean ± half the 95 % interval over {first.seeds} seeds" if first.seeds > 1 else ""
    found = {(row.policy, row.budget): _cell(row) for row in rows}
    lines = [("kept per layer and head", *map(str, budgets))]
    for policy in dict.fromkeys(row.policy for row in rows if row.policy != "full"):
        lines.append((policy, *(found.get((policy, budget), "") for budget in budgets)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"{first.task}, {first.length} tokens: {unit}{spread}"]
    if budgets:
        text += ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [f"{'full cache'.ljust(widths[0])}  {_cell(row)}" for row in rows if row.policy == "full"]
    return "\n".join(text)


def _cell(row: Row) -> str:
    digits = 1 if row.metric == "accuracy" else 3
    score, half = (plots.shown(row.metric, x) for x in (row.score, (row.high - row.low) / 2))
    return f"{score:.{digits}f} ± {half:.{digits}f}" if row.seeds > 1 else f"{score:.{digits}f}"


def save(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Writes rows as a JSON list of objects, under a temporary name first, so that `path` is never half a file.

    Raises:
      ValueError: when a number is not finite; JSON has no such numbers.
    """
    text = "[\n" + ",\n".join(json.dumps(row._asdict(), allow_nan=False) for row in rows) + "\n]\n"
    files.write_atomically(path, lambda temporary: temporary.write_text(text))


def run(model: Decoder, config: EvalConfig, data: DataConfig, output: pathlib.Path | None) -> list[Row]:
    """Evaluates everything the config names and prints a table for each task and length as soon as it is known.

    Args:
      model: backbone and gates.
      config: tasks, lengths, policies, budgets, seeds.
      data: where task "text" has its held-out text.
      output: folder for `results.json` and `quality_<task>.png`; None writes nothing. Only process 0 writes.

    Raises:
      ValueError: as `check` and `examples` do, and when the model's vocabulary is too small for a task.
    """
    check(config, data)
    first_process, rows = jax.process_index() == 0, []
    if output is not None and first_process:
        output.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad path costs no time
    blocks = [(task, length) for task in config.tasks for length in config.lengths]
    steps = 2 * sum(len(cells(config, length)) for _, length in blocks)
    with tqdm.tqdm(total=steps, leave=False, disable=None if first_process else True) as progress:
        for task, length in blocks:
            block = _rows(model, config, data, task, length, progress)
            rows += block
            if first_process:
                tqdm.tqdm.write(table(block) + "\n")
                if output is not None:
                    save(rows, output / "results.json")
    if output is not None and first_process:
        for task in config.tasks:
            plots.quality([row for row in rows if row.task == task], output / f"quality_{task}.png")
    return rows


def override(
    config: EvalConfig,
    *,
    tasks: Sequence[str] | None,
    policies: Sequence[str] | None,
    budgets: Sequence[str] | None,
    lengths: Sequence[str] | None,
    seed: int | None,
) -> EvalConfig:
    """The config with the flags that were given (not None) in place of its fields.

    Raises:
      ValueError: when a budget or length is not a whole number, and as EvalConfig does.
    """
    changes: dict[str, object] = {"tasks": tasks, "policies": policies, "seed": seed}
    for name, texts in (("budgets", budgets), ("lengths", lengths)):
        if bad := [text for text in texts or () if not text.isdecimal()]:
            raise ValueError(f"--{name} must be whole numbers separated by commas, got {bad[0]!r}")
        changes[name] = None if texts is None else tuple(map(int, texts))
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if v is not None}
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


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
    folder = weights.resolve(checkpoint)
    gates = folder if gate_files.weight_files(folder) else folder / "gates"
    has_gates = bool(gate_files.weight_files(gates))
    if needs_gates and not has_gates:
        raise ValueError(
            f"{folder}: holds neither gates.safetensors nor gates/; policies 'retention*' need trained gates"
        )
    return str(weights.resolve(backbone or gates.parent / "backbone")), str(gates) if has_gates else None


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: `train` imports this module and has a --config of its own."""
    config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    several = functools.partial(flags.DEFINE_list, default=None, flag_values=values)
    text("checkpoint", "", "Training workdir, or gate folder.")
    text("output", "", "Folder for results.json and figures; empty writes none.")
    several("tasks", help=f"In place of config.eval.tasks, out of: {', '.join(TASKS)}.")
    several("policies", help=f"In place of config.eval.policies, out of: {', '.join(POLICIES)}.")
    several("budgets", help="In place of config.eval.budgets: kept entries per layer and head.")
    several("lengths", help="In place of config.eval.lengths: tokens a sequence.")
    flags.DEFINE_integer("seed", None, "In place of config.eval.seed, the first seed.", flag_values=values)
    flags.mark_flag_as_required("config", flag_values=values)
    distributed.define_flags(values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = config_io.from_config_dict(TrainConfig, values.config)
    given = {name: values[name].value for name in ("tasks", "policies", "budgets", "lengths", "seed")}
    chosen = override(config.eval, **given)
    check(chosen, config.data)
    output = pathlib.Path(values.output).expanduser() if values.output else None
    with distributed.joined(values):
        checkpoint.agree_on({"config": config_io.to_dict(config), "eval": config_io.to_dict(chosen)})
        backbone, gates = checkpoint_folders(values.checkpoint, config.backbone, chosen.policies)
        run(weights.load(backbone, gates, config.dtype), chosen, config.data, output)


if __name__ == "__main__":
    jax.config.config_with_absl()
    program_cache.keep_programs()
    define_flags(flags.FLAGS)
    app.run(main)

"""Dilution of every length, policy and budget, as a table, a JSON file and a figure."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import scipy.special
import tqdm
from jaxtyping import Float

from retention_jax.config import DataConfig, EvalConfig
from retention_jax.data import recall
from retention_jax.dilution import plots
from retention_jax.dilution.measure import measure
from retention_jax.dilution.plots import Result
from retention_jax.evaluation import buffers, devices, plan, sequences
from retention_jax.evaluation.rows import interval
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import distributed, sharding
from retention_jax.policies.table import FULL
from retention_jax.runtime import files


def check(config: EvalConfig, data: DataConfig) -> None:
    """Raises ValueError, naming all that is wrong, where dilution cannot be measured; asks no model and no device."""
    plan.check(config, data)
    problems = [
        f"policy {name!r} must know what comes, which is not given here"
        for name in config.policies
        if (policy := buffers.policy_of(name)) and policy.needs_future
    ]
    if config.tasks != ("recall",):
        problems.append(f"only the task 'recall' knows its useful tokens, got {', '.join(config.tasks)}")
    if problems:
        raise ValueError("dilution: " + "; ".join(problems))


def run(model: Decoder, config: EvalConfig, data: DataConfig, output: pathlib.Path | None) -> list[Result]:
    """Measures every length, policy and budget and prints a table for each length as soon as it is known.

    Several processes that each hold the whole model share the work; a model that lies across them is run by all
    together. The model may lie on a mesh.

    Args:
      model: backbone and gates.
      config: lengths, policies, budgets, seeds, options of the cache; the task must be recall alone.
      data: the config's; recall needs nothing of it.
      output: folder for `dilution.json` and `dilution.png`; None writes nothing. Only process 0 writes.

    Raises:
      ValueError: as `check` does, when the vocabulary is too small for the task, and when a buffer does not fit the
        model's mesh.
    """
    check(config, data)
    if model.config.vocab_size < recall.VOCAB_SIZE:
        raise ValueError(f"task 'recall' needs a vocabulary of {recall.VOCAB_SIZE}, got {model.config.vocab_size}")
    plan.check_mesh(model, config)
    process, processes = jax.process_index(), jax.process_count()
    alone, results = devices.is_own(model), []
    if output is not None:
        # Before the work, so that a bad path costs no time.
        distributed.together(lambda: None if process else output.mkdir(parents=True, exist_ok=True))
    cells = {length: buffers.cells(config, length) for length in config.lengths}
    with tqdm.tqdm(total=sum(map(len, cells.values())), leave=False, disable=True if process else None) as bar:
        for length, here in cells.items():
            mine = here[process::processes] if alone else here
            measured = []
            for name, budget in mine:
                bar.set_description(f"{length} tokens: {name} {budget}")
                measured.append(evaluated(model, config, data, length, name, budget))
                bar.update(len(here) / len(mine))
            found = _shared_out(measured) if alone else measured
            results += sorted(found, key=lambda r: here.index((r.policy, r.budget)))
            if process == 0:
                tqdm.tqdm.write(table([r for r in results if r.length == length]) + "\n")
                if output is not None:
                    save(results, output / "dilution.json")
    if output is not None and process == 0:
        plots.figure(results, output / "dilution.png")
    return results


def _shared_out(measured: list[Result]) -> list[Result]:
    """The results of all processes, on each. Their numbers stay bitwise what they are."""
    if jax.process_count() == 1:
        return measured
    plain = [[value.tolist() if isinstance(value, np.ndarray) else value for value in result] for result in measured]
    array = lambda value: np.array(value) if isinstance(value, list) else value
    found = [values for text in distributed.gather(json.dumps(plain)) for values in json.loads(text)]
    return [Result._make(map(array, values)) for values in found]


def evaluated(model: Decoder, config: EvalConfig, data: DataConfig, length: int, name: str, budget: int) -> Result:
    """Dilution and accuracy of one policy and budget on the recall sequences of all seeds, at one length."""
    tokens, label_mask = sequences.examples("recall", config, data, length)
    cache = buffers.buffer_of(config, name, budget, length)
    if name == FULL:  # one chunk: nothing is evicted before the last token has been read
        cache = dataclasses.replace(cache, recent=length)
    accuracy, dilution, off_facts, margins, crowds = [], [], [], [], []
    for rows, labels in zip(tokens, label_mask, strict=True):  # a seed at a time: the full cache needs the memory
        n = len(rows)
        rows_and_more = np.pad(rows, ((0, -n % sharding.row_parts(model)), (0, 0)), mode="edge")
        asked = np.clip(rows_and_more - recall.FIRST_KEY, 0, recall.NUM_KEYS - 1)
        with sharding.enter_mesh_of(model):
            measured = measure(model, rows_and_more, recall.facts_at(rows_and_more), asked, cache)
        found = jax.tree.map(lambda a, n=n: sharding.on_host(a)[:n], measured)
        queries = np.pad(labels[:, 1:], ((0, 0), (0, 1)))  # the key, after which the answer is predicted
        on_asked, on_any, useful, seen = (a[queries].astype(np.float64) for a in found[:4])
        accuracy.append(sequences.accuracy(found.best[:, :-1], rows, labels))
        dilution.append(1 - on_asked.mean(axis=0))
        off_facts.append(1 - on_any.mean(axis=0))
        useful, seen = np.rint(useful), np.rint(seen)
        both = (useful > 0) & (useful < seen)
        crowd = np.where(both, (seen - useful) / np.maximum(useful, 1), np.nan)
        crowds.append(crowd)
        margins.append(scipy.special.logit(on_asked) + np.log(crowd))
    return Result(
        length=length,
        policy=name,
        budget=budget,
        accuracy=np.array(accuracy),
        dilution=np.array(dilution),
        off_facts=np.array(off_facts),
        margin=_median(np.concatenate(margins)),
        crowd=_median(np.concatenate(crowds)),
        queries=int(label_mask.sum()),
    )


def _median(x: Float[np.ndarray, "queries L N"]) -> Float[np.ndarray, "L N"]:
    """The median over queries of the numbers that are not nan; nan where all are."""
    columns = x.reshape(len(x), -1).T
    return np.array([np.median(c[~np.isnan(c)]) if not np.isnan(c).all() else np.nan for c in columns]).reshape(
        x.shape[1:]
    )


def table(results: Sequence[Result]) -> str:
    """The results of one length as text: accuracy, and the mean dilution of each layer's heads."""
    layers, seeds = results[0].margin.shape[0], len(results[0].accuracy)
    lines: list[tuple[str, ...]] = [
        ("", "accuracy %", *(f"dilution, layer {i}" for i in range(layers)), f"off all facts, layer {layers - 1}")
    ]
    for r in results:
        name = "full cache" if r.is_full else f"{r.policy.replace('_', ' ')}, {r.budget} kept"
        by_layer = [r.dilution[:, i].mean(axis=-1) for i in range(layers)] + [r.off_facts[:, -1].mean(axis=-1)]
        lines.append((name, _shown(100 * r.accuracy, 1), *(_shown(d, 3) for d in by_layer)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    spread = f"; mean ± half the 95 % interval over {seeds} seeds" if seeds > 1 else ""
    text = [f"recall, {results[0].length} tokens, {results[0].queries} queries{spread}"]
    text += ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(text)


def _shown(by_seed: Float[np.ndarray, " seeds"], digits: int) -> str:
    mean, low, high = interval(by_seed.tolist())
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}" if len(by_seed) > 1 else f"{mean:.{digits}f}"


def save(results: Sequence[Result], path: pathlib.Path) -> None:
    """Writes results as a JSON list of objects whose arrays are nested lists; what is not finite is null."""

    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            return np.where(np.isfinite(value), value.astype(object), None).tolist()  # pyright: ignore
        return value

    rows = [{name: plain(value) for name, value in r._asdict().items()} for r in results]
    text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
    files.write_atomically(path, lambda temporary: temporary.write_text(text))

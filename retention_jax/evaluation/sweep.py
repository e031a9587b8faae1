"""Runs what is left of an evaluation: units dealt out to processes, each result on disk as soon as it is there."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm

from retention_jax import checkpoint, distributed, plots
from retention_jax.config import CacheConfig
from retention_jax.evaluation import journal, rows
from retention_jax.evaluation.answers import Answers
from retention_jax.evaluation.journal import Journal, Result, Unit
from retention_jax.evaluation.rows import Row
from retention_jax.evaluation.streams import Streams

CacheOf = Callable[[str, int, int], CacheConfig]  # of a policy, a budget, and a length that "full" must hold


Block = Streams | Answers  # one task at one length


def dealt(units: Sequence[Unit], process: int, processes: int) -> list[Unit]:
    """The units that one process computes."""
    return list(units[process::processes])


def run(
    blocks: Sequence[Block],
    cells: Callable[[int], list[tuple[str, int]]],
    cache_of: CacheOf,
    *,
    header: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    output: pathlib.Path | None,
    alone: bool,
) -> list[Row]:
    """Computes what no journal in `output` has, and prints a table for each block as soon as it is known.

    Args:
      blocks: what is evaluated.
      cells: policies and budgets of a block, by its length.
      cache_of: the buffer that a policy's name stands for.
      header: stands once in `results.json`.
      fingerprint: what results depend on beside their unit.
      output: folder of all processes for journals, `results.json` and `quality_<task>.png`; None writes nothing.
      alone: whether a process can compute a unit without the others; then units are dealt out to them.

    Raises:
      ValueError: as `journal.read` does, and when processes do not share the folder.
    """
    process, processes = jax.process_index(), jax.process_count()
    done: dict[Unit, Result] = {}
    if output is not None:
        checkpoint.share(output)
        done = journal.read(output, fingerprint)
        distributed.gather("")  # all have read before the first writes
    # Process 0 says what is done, should a file have reached only some of them.
    finished = {Unit(*unit) for unit in json.loads(distributed.gather(json.dumps(list(done)))[0])}
    wanted = {id(block): [block.units(*cell) for cell in cells(block.length)] for block in blocks}
    for block in blocks:
        for unit in (unit for units in wanted[id(block)] for unit in units if unit in done):
            if done[unit]["of"] != block.of(unit):
                raise ValueError(f"{output} holds results of other texts of {block.task!r}; give another --output")
    left = {id(block): [u for cell in wanted[id(block)] for u in cell if u not in finished] for block in blocks}
    mine = {key: dealt(units, process, processes) if alone else units for key, units in left.items()}
    found: list[Row] = []
    with contextlib.ExitStack() as stack:
        book = Journal(output, process, fingerprint) if output is not None and (alone or process == 0) else None
        stack.callback(book.close if book else lambda: None)
        bar = stack.enter_context(
            tqdm.tqdm(
                total=sum(map(len, mine.values())), unit="unit", leave=False, disable=None if process == 0 else True
            )
        )
        for block in blocks:
            fresh: list[tuple[Unit, Result]] = []
            cell = None
            bar.set_description(f"{block.task}, {block.length} tokens")
            for unit, result in block.results(mine[id(block)], cache_of) if mine[id(block)] else ():
                bar.set_description(f"{unit.task}, {unit.length} tokens: {unit.policy} {unit.budget}")
                if (unit.policy, unit.budget) != cell:
                    cell = (unit.policy, unit.budget)
                    # Those of the cells before: programs map memory, and after some hundred XLA dies in mmap.
                    jax.clear_caches()
                result = {"of": block.of(unit), **result}
                if book:
                    book.write(unit, result)
                fresh.append((unit, result))
                bar.update()
            for text in distributed.gather(json.dumps(fresh)):
                done |= {Unit(*unit): result for unit, result in json.loads(text)}
            here = [block.row({unit: done[unit] for unit in units}) for units in wanted[id(block)]]
            found += here
            if process == 0:
                tqdm.tqdm.write(rows.table(here) + "\n")
                if output is not None:
                    rows.save(header, found, output / "results.json")
    if output is not None and process == 0:
        for task in dict.fromkeys(row.task for row in found):
            name = task.replace("/", "_")
            plots.quality([row for row in found if row.task == task], output / f"quality_{name}.png")
    return found

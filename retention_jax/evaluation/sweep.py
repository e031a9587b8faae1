"""Computes what no journal has yet. Processes share the units, and each result is on disk as soon as it is known."""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm

from retention_jax.config import CacheConfig
from retention_jax.evaluation import journal, plots, rows
from retention_jax.evaluation.answers import Answers
from retention_jax.evaluation.faithfulness import Faithfulness
from retention_jax.evaluation.journal import Journal, Result, Unit
from retention_jax.evaluation.rows import Row
from retention_jax.evaluation.sequences import Sequences
from retention_jax.parallel import distributed

Block = Sequences | Answers | Faithfulness  # one task at one length


def dealt(units: Sequence[Unit], process: int, processes: int) -> list[Unit]:
    """The units that one process computes."""
    return list(units[process::processes])


def run(
    blocks: Sequence[Callable[[], Block]],
    cells: Callable[[int], list[tuple[str, int]]],
    cache_of: Callable[[str, int, int], CacheConfig],
    *,
    header: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    output: pathlib.Path | None,
    alone: bool,
) -> list[Row]:
    """Computes what no journal in `output` has, and prints a table for each block as soon as it is known.

    Args:
      blocks: each makes one task at one length. Texts and prompts of one block are in memory at a time.
      cells: takes a block's length; returns its policies and budgets.
      cache_of: takes a policy's name, a budget and the length that the full cache must hold; returns the buffer.
      header: what is true of the whole run, for `results.json`.
      fingerprint: what results depend on beside their unit.
      output: folder of all processes for journals, `results.json` and `quality_<task>.png`; None writes nothing.
      alone: whether a process can compute a unit without the others. Then each process computes its share of them.

    Raises:
      ValueError: as `journal.read` and the blocks do, when processes do not share the folder, and when it holds results
        of other texts.
    """
    process, processes = jax.process_index(), jax.process_count()
    done: dict[Unit, Result] = {}
    if output is not None:
        distributed.share_folder(output)
        done = journal.read(output, fingerprint)
        distributed.gather("")  # all have read before the first writes
    # Process 0 decides what is done, since a file may have reached only some of the processes.
    mine = [list(done), [unit for unit, result in done.items() if "scores" in result]]
    of_first = json.loads(distributed.gather(json.dumps(mine))[0])
    answered, finished = ({Unit(*unit) for unit in units} for units in of_first)
    answered = set(done) if alone else answered
    scoring = alone or process == 0
    found: list[Row] = []
    with contextlib.ExitStack() as stack:
        book = Journal(output, process, fingerprint) if output is not None and scoring else None
        stack.callback(book.close if book else lambda: None)
        width = len(cells(1))  # a block's share of the progress bar; how many units it has is known when it is made
        bar = stack.enter_context(
            tqdm.tqdm(
                total=width * len(blocks),
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
                leave=False,
                disable=None if process == 0 else True,
            )
        )

        def computed(block: Block) -> list[Row]:
            wanted = [block.units(*cell) for cell in cells(block.length)]
            units = list(itertools.chain(*wanted))
            for unit in (unit for unit in units if unit in done):
                if done[unit]["digest"] != block.digest(unit):
                    raise ValueError(f"{output} holds results of other texts of {block.task!r}; give another --output")
            left = [unit for unit in units if unit not in finished]
            mine = dealt(left, process, processes) if alone else left
            bar.total -= width * (1 - len(mine) / len(units))  # what others do, and what was done before
            written = [(unit, done[unit]) for unit in mine if unit in answered and scoring]
            new = [unit for unit in mine if unit not in answered]
            fresh: list[tuple[Unit, Result]] = []
            bar.set_description(f"{block.task}, {block.length} tokens")
            for unit, result in itertools.chain(written, block.results(new, cache_of)):
                bar.set_description(f"{unit.task}, {unit.length} tokens: {unit.policy} {unit.budget}")
                if unit not in answered:
                    result = {"digest": block.digest(unit), "made_by": rows.made_by(), **result}
                    if book:
                        book.write(unit, result)
                if isinstance(block, Answers) and scoring:  # scored once they are on disk: a judge may fail
                    result = {**result, "scores": block.scores(unit, result)}
                    if book:
                        book.write_scores(unit, result["scores"])
                if scoring:
                    fresh.append((unit, result))
                bar.update(width / len(units))
            for text in distributed.gather(json.dumps(fresh)):
                done.update({Unit(*unit): result for unit, result in json.loads(text)})
            return [row for of_cell in wanted for row in block.rows({unit: done[unit] for unit in of_cell})]

        for make in blocks:
            here = computed(make())
            found += here
            if process == 0:
                for task in dict.fromkeys(row.task for row in here):
                    tqdm.tqdm.write(rows.table([row for row in here if row.task == task]) + "\n")
                if output is not None:
                    rows.save(header, found, output / "results.json")
    if output is not None and process == 0:
        for task in dict.fromkeys(row.task for row in found):
            name = task.replace("/", "_")
            plots.quality([row for row in found if row.task == task], output / f"quality_{name}.png")
    return found

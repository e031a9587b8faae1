"""A file of prompts in, a file of results out; JSON lines both.

A line of the first is an object with `prompt`, a text, or `messages`, the turns before a reply. A line of the second is
the same object with the fields of `RESULT_FIELDS`. Lines come in the order in which batches finish. A run that was
killed goes on when it is started again: finished rows are not computed twice.
"""

import contextlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from retention_jax.generation import conversation
from retention_jax.generation.conversation import Totals, Writer
from retention_jax.generation.runs import generate
from retention_jax.parallel import distributed
from retention_jax.runtime import files

# index: of the row, from 0. stopped: whether the reply ended itself. run: `conversation.run_id` of the settings.
RESULT_FIELDS = ("index", "output", "prompt_tokens", "new_tokens", "stopped", "run")


class Prompt(NamedTuple):
    index: int
    row: dict[str, Any]
    tokens: list[int]


def read_prompts(writer: Writer, path: pathlib.Path) -> list[Prompt]:
    """The rows of a file, with their tokens.

    Raises:
      ValueError: when the file is missing or has no rows, or naming every line that is no prompt.
    """
    prompts, problems = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompts.append(Prompt(len(prompts), row, _tokens(writer, row)))
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if problems:
        raise ValueError(files.first_problems(problems))
    if not prompts:
        raise ValueError(f"{path}: has no prompts")
    return prompts


def _tokens(writer: Writer, row: Any) -> list[int]:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError("must be an object with either prompt or messages")
    if clash := [name for name in RESULT_FIELDS if name in row]:
        raise ValueError(f"has a field {clash[0]!r}, which a result is written to")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise ValueError(f"prompt must be a text, got {row['prompt']!r}")
    if "messages" in row and not (
        isinstance(row["messages"], list) and all(isinstance(m, dict) for m in row["messages"])
    ):
        raise ValueError("messages must be a list of objects")
    files.json_line(row)  # refuses what could not be written: NaN, and half a surrogate pair
    return conversation.prompt_tokens(writer, row["prompt"] if "prompt" in row else row["messages"])


def write_results(writer: Writer, prompts: list[Prompt], path: pathlib.Path, batch_size: int, run: str) -> Totals:
    """Continues every prompt that has no result yet, in batches of similar length, the longest first.

    What is drawn for a row depends on the seed and on the row's index, not on its place in a batch. Logits can differ
    by rounding with the padded width of the batch, and in bfloat16 that can change a token. All processes work on every
    batch. Only process 0 writes: whole lines, after each batch.

    Raises:
      ValueError: when `path` holds results of other prompts or settings, when another process writes it, or when
        batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    first_process, totals = jax.process_index() == 0, Totals()
    with contextlib.ExitStack() as held:
        open_results = lambda: _open_results(held, prompts, path, run) if first_process else []
        finished = np.zeros(len(prompts), bool)
        finished[distributed.together(open_results)] = True
        finished = multihost_utils.broadcast_one_to_all(finished)
        todo = sorted((p for p in prompts if not finished[p.index]), key=lambda p: -len(p.tokens))
        progress = tqdm.tqdm(
            total=len(prompts), initial=len(prompts) - len(todo), unit="prompt", disable=None if first_process else True
        )
        held.enter_context(progress)
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            out = generate(
                writer.model,
                [p.tokens for p in batch],
                writer.cache,
                max_new_tokens=writer.max_new_tokens,
                seed=writer.seed,
                **writer.drawing,
                stop_tokens=writer.tokenizer.stop_tokens,
                row_ids=[p.index for p in batch],
            )
            totals = totals.add(out.stats)
            if first_process:
                results = [_result(writer, p, new, run) for p, new in zip(batch, out.tokens, strict=True)]
                files.append_json_line(path, *results)
            progress.update(len(batch))
    return totals


def _open_results(held: contextlib.ExitStack, prompts: list[Prompt], path: pathlib.Path, run: str) -> list[int]:
    """Makes the file where it is not there, and holds it for this process. The indices of the rows that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held.enter_context(files.locked(path))
    return _finished(prompts, path, run)


def _result(writer: Writer, prompt: Prompt, new: list[int], run: str) -> dict[str, Any]:
    values = (
        prompt.index,
        writer.tokenizer.decode(new),
        len(prompt.tokens),
        len(new),
        new[-1] in writer.tokenizer.stop_tokens,
        run,
    )
    return {**prompt.row, **dict(zip(RESULT_FIELDS, values, strict=True))}


def _finished(prompts: list[Prompt], path: pathlib.Path, run: str) -> list[int]:
    """Indices of the rows that `path` has results of."""
    results, torn = files.read_json_lines(path)
    indices = []
    for number, result in enumerate(results, 1):
        if not isinstance(result, dict) or any(name not in result for name in RESULT_FIELDS):
            raise ValueError(f"{path}, line {number}: no result of this command; name another --output")
        if result["run"] != run:
            raise ValueError(f"{path}, line {number}: written with other settings; name another --output")
        row = {name: value for name, value in result.items() if name not in RESULT_FIELDS}
        index = result["index"]
        if not isinstance(index, int) or not 0 <= index < len(prompts) or row != prompts[index].row:
            raise ValueError(f"{path}, line {number}: the result of another prompt; name another --output")
        indices.append(index)
    begun = (files.json_line(p.row)[:-1] for p in prompts)
    if torn and not any(torn.startswith(row) or row.startswith(torn) for row in begun):
        raise ValueError(f"{path}: does not end with a result of this command; name another --output")
    return indices

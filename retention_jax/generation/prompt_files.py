"""A file of prompts in, a file of results out; JSON lines both.

A line of the first is an object with `prompt`, a text, or `messages`, the turns before a reply. A line of the second is
the same object with the fields of `RESULT_FIELDS`. Lines come in the order in which batches finish. A run that was
killed goes on when it is started again: finished rows are not computed twice.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from retention_jax.generation import conversation
from retention_jax.generation.conversation import Totals, Writer
from retention_jax.generation.decoding import generate
from retention_jax.parallel import sharding

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
        more = [f"and {len(problems) - 10} lines more"] * (len(problems) > 10)
        raise ValueError("\n".join(problems[:10] + more))
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
    _dump(row)  # refuses halves of surrogate pairs, which could not be written
    return conversation.prompt_tokens(writer, row["prompt"] if "prompt" in row else row["messages"])


def write_results(writer: Writer, prompts: list[Prompt], path: pathlib.Path, batch_size: int, run: str) -> Totals:
    """Continues every prompt that has no result yet, in batches of similar length, the longest first.

    Samples depend on the seed and on a row's index, not on batches. All processes work on every batch; only process 0
    writes, whole lines, after each one.

    Raises:
      ValueError: when `path` holds results of other prompts or settings, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    first_process, totals = jax.process_index() == 0, Totals()
    finished = np.zeros(len(prompts), bool)
    indices, whole = _finished(prompts, path, run)
    finished[indices] = True
    finished = multihost_utils.broadcast_one_to_all(finished)  # all have read before the first writes
    if first_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, whole)
    todo = sorted((p for p in prompts if not finished[p.index]), key=lambda p: -len(p.tokens))
    with tqdm.tqdm(
        total=len(prompts), initial=len(prompts) - len(todo), unit="prompt", disable=None if first_process else True
    ) as progress:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            # Rows of devices want equally many prompts: the last one is repeated, and what it writes again is left out.
            filled = batch + batch[-1:] * (-len(batch) % sharding.row_parts(writer.model))
            out = generate(
                writer.model,
                [p.tokens for p in filled],
                writer.cache,
                max_new_tokens=writer.max_new_tokens,
                seed=writer.seed,
                **writer.drawing,
                stop_tokens=writer.tokenizer.stop_tokens,
                row_ids=[p.index for p in filled],
            )
            new_tokens = out.tokens[: len(batch)]
            counts = {
                "prompt_tokens": float(sum(len(p.tokens) for p in batch)),
                "new_tokens": float(sum(map(len, new_tokens))),
            }
            totals = totals.add(out.stats | counts)
            if first_process:
                _append(path, [_result(writer, p, new, run) for p, new in zip(batch, new_tokens, strict=True)])
            progress.update(len(batch))
    return totals


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


def _finished(prompts: list[Prompt], path: pathlib.Path, run: str) -> tuple[list[int], int]:
    """Indices of the rows that `path` has results of, and its length in bytes up to the last whole line."""
    if not path.exists():
        return [], 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    indices = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if not isinstance(result, dict) or any(name not in result for name in RESULT_FIELDS):
            raise ValueError(f"{path}, line {number}: no result of this command; name another --output")
        if result["run"] != run:
            raise ValueError(f"{path}, line {number}: written with other settings; name another --output")
        row = {name: value for name, value in result.items() if name not in RESULT_FIELDS}
        if not 0 <= result["index"] < len(prompts) or _dump(row) != _dump(prompts[result["index"]].row):
            raise ValueError(f"{path}, line {number}: the result of another prompt; name another --output")
        indices.append(result["index"])
    half = content[whole:]  # a machine that went down can leave one
    begun = (_dump(p.row)[:-1] for p in prompts)
    if half and not any(half.startswith(row) or row.startswith(half) for row in begun):
        raise ValueError(f"{path}: does not end with a result of this command; name another --output")
    return indices, whole


def _dump(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _append(path: pathlib.Path, results: list[dict[str, Any]]) -> None:
    with open(path, "ab") as file:
        file.write(b"".join(_dump(result) + b"\n" for result in results))
        file.flush()
        os.fsync(file.fileno())

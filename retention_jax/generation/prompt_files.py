"""A file of prompts in, a file of results out; JSON lines both.

A line of the first is an object with `prompt`, a text, or `messages`, the turns before a reply; `system`, a text, and
`tools`, JSON schemas of functions, go to the chat template. A line of the second is
the same object with the fields of `RESULT_FIELDS`. Lines come in the order in which batches finish. A run that was
killed goes on when it is started again: finished rows are not computed twice. Messages may hold pictures and clips
(`vision/messages.py`), whose paths count from where the command is run.
"""

import json
import pathlib
from typing import Any, NamedTuple

import tqdm

from retention_jax.generation import conversation
from retention_jax.generation.conversation import Totals, Writer
from retention_jax.generation.runs import generate
from retention_jax.models.inputs import Row, ids_of
from retention_jax.parallel import sharding
from retention_jax.runtime import files
from retention_jax.text import chat
from retention_jax.vision import prompt as vision_prompt

# index: of the row, from 0. stopped: whether the reply ended itself. run: `conversation.run_id` of the settings.
RESULT_FIELDS = ("index", "output", "prompt_tokens", "new_tokens", "stopped", "run")


class Prompt(NamedTuple):
    index: int
    row: dict[str, Any]
    length: int  # tokens
    tokens: Row | None  # None where there are pictures: those of a batch are read again, so that no more are held


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
            tokens = _tokens(writer, row)
            kept = None if isinstance(tokens, vision_prompt.Prompt) else tokens
            prompts.append(Prompt(len(prompts), row, len(ids_of(tokens)), kept))
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if problems:
        raise ValueError(files.first_problems(problems))
    if not prompts:
        raise ValueError(f"{path}: has no prompts")
    conversation.warn_of_length(writer, str(path), [p.length for p in prompts])
    return prompts


def _tokens(writer: Writer, row: Any) -> Row:
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
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    if not isinstance(system := row.get("system"), str | None):
        raise ValueError(f"system must be a text, got {system!r}")
    return conversation.prompt_tokens(writer, prompt, system=system, tools=chat.tools_of(row.get("tools")))


def write_results(writer: Writer, prompts: list[Prompt], path: pathlib.Path, batch_size: int, run: str) -> Totals:
    """Continues every prompt that has no result yet, in batches of similar length, the longest first.

    What is drawn for a row depends on the seed and on the row's index, not on its place in a batch. Logits can differ
    by rounding with the padded width of the batch, and in bfloat16 that can change a token. Whole lines
    are written after each batch.

    Raises:
      ValueError: when `path` holds results of other prompts or settings, when another process writes it, or when
        batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    totals = Totals()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path):
        finished = set(_finished(prompts, path, run))
        todo = sorted((p for p in prompts if p.index not in finished), key=lambda p: -p.length)
        with tqdm.tqdm(total=len(prompts), initial=len(finished), unit="prompt", disable=None) as progress:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                # Rows of devices want equally many prompts: the last one is repeated, and its copies are left out.
                filled = batch + batch[-1:] * (-len(batch) % sharding.row_parts(writer.model))
                out = generate(
                    writer.model,
                    [p.tokens or _tokens(writer, p.row) for p in filled],
                    writer.cache,
                    max_new_tokens=writer.max_new_tokens,
                    seed=writer.seed,
                    **writer.drawing,
                    stop_tokens=writer.tokenizer.stop_tokens,
                    row_ids=[p.index for p in filled],
                )
                new_tokens = out.tokens[: len(batch)]
                counts = {
                    "prompt_tokens": float(sum(p.length for p in batch)),
                    "new_tokens": float(sum(map(len, new_tokens))),
                }
                totals = totals.add(out.stats | counts)
                results = [_result(writer, p, new, run) for p, new in zip(batch, new_tokens, strict=True)]
                files.append_json_line(path, *results)
                progress.update(len(batch))
    return totals


def _result(writer: Writer, prompt: Prompt, new: list[int], run: str) -> dict[str, Any]:
    values = (
        prompt.index,
        writer.tokenizer.decode(new),
        prompt.length,
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

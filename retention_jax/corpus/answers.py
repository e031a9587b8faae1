"""The model's own answers to prompts: training data that needs no labels.

A prompt is one turn of a user or several, each asked after the model has answered the one before. The cache is full,
tokens are drawn, and the results are JSON lines, on disk after every batch; a run that was killed goes on where it was.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from retention_jax.config import CacheConfig
from retention_jax.data import sources
from retention_jax.generation import conversation
from retention_jax.generation.conversation import Writer
from retention_jax.generation.runs import generate
from retention_jax.runtime import files
from retention_jax.text.chat import Message

_FIELDS = ("messages", "index", "stopped", "run")  # of a row


def read_prompts(source: str) -> list[list[str]]:
    """The turns of every prompt of a file, as `sources.objects` reads it.

    A row has `turns`, a list of texts (MT-bench), or `question` (GSM8K) or `prompt`, a text.

    Raises:
      ValueError: naming the rows that have none of them, and as `sources.objects` does.
    """
    prompts, problems = [], []
    for number, row in enumerate(sources.objects(source), 1):
        turns = row.get("turns", [row.get("question", row.get("prompt"))])
        if isinstance(turns, list) and turns and all(isinstance(text, str) and text.strip() for text in turns):
            prompts.append(turns)
        else:
            problems.append(f"{source}, row {number}: needs turns, a list of texts, or question or prompt, a text")
    if problems:
        raise ValueError(files.first_problems(problems))
    return prompts


def write(
    writer: Writer, prompts: Sequence[Sequence[str]], path: pathlib.Path, count: int, batch_size: int, run: str
) -> None:
    """Appends to a file of JSON lines until it has `count` conversations.

    Conversation i is about prompt i modulo the number of prompts. It depends on i and the seed, not on the batch.
    A row has `messages`; `index`, which is i; `stopped`, whether the last answer ended itself, after which no more is
    asked where it did not; and `run`.

    Args:
      writer: model, tokenizer, and how tokens are drawn; its cache is not used.
      prompts: the turns of each.
      path: the file, which is continued.
      count: conversations in all.
      batch_size: conversations that are written together.
      run: a name of the settings and prompts, `conversation.run_id`.

    Raises:
      ValueError: when `path` holds something else, or another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path):
        finished = _finished(path, run)
        todo = [i for i in range(count) if i not in finished]
        bar = tqdm.tqdm(total=count, initial=count - len(todo), desc="answers", unit="conversation", disable=None)
        with bar, files.open_json_lines(path) as file:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                rows = _converse(writer, [prompts[i % len(prompts)] for i in batch], batch)
                files.append_json_line(file, *({**row, "run": run} for row in rows))
                bar.update(len(batch))


def _finished(path: pathlib.Path, run: str) -> set[int]:
    """Indices of the conversations that the file has."""
    found = files.read_json_lines(path).values
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict) or any(name not in row for name in _FIELDS):
            raise ValueError(f"{path}, line {number}: not written by this command; name another --output")
        if row["run"] != run:
            raise ValueError(f"{path}, line {number}: written with other settings or prompts; name another --output")
    return {row["index"] for row in found}


def _converse(writer: Writer, prompts: Sequence[Sequence[str]], indices: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of some conversations, turn by turn, each turn in one batch."""
    messages: list[list[Message]] = [[] for _ in prompts]
    stopped = [True] * len(prompts)
    for turn in range(max(map(len, prompts))):
        asked = [i for i, turns in enumerate(prompts) if turn < len(turns) and stopped[i]]
        if not asked:
            break
        for i in asked:
            messages[i].append({"role": "user", "content": prompts[i][turn]})
        tokens = [conversation.prompt_tokens(writer, messages[i]) for i in asked]
        # Another seed for each turn: with the same one, every turn of a conversation would have the same draws.
        seed = int(np.random.SeedSequence((writer.seed, turn)).generate_state(1)[0]) // 2
        out = generate(
            writer.model,
            tokens,
            _full_cache(max(map(len, tokens)) + writer.max_new_tokens),
            max_new_tokens=writer.max_new_tokens,
            seed=seed,
            **writer.drawing,
            stop_tokens=writer.tokenizer.stop_tokens,
            row_ids=[indices[i] for i in asked],
        )
        for i, new in zip(asked, out.tokens, strict=True):
            messages[i].append({"role": "assistant", "content": writer.tokenizer.decode(new)})
            stopped[i] = new[-1] in writer.tokenizer.stop_tokens
    return [
        {"messages": said, "index": index, "stopped": ended}
        for said, index, ended in zip(messages, indices, stopped, strict=True)
    ]


def _full_cache(tokens: int) -> CacheConfig:
    """Room for every token. A multiple of 256, so that few programs are compiled."""
    return CacheConfig.full(-(-tokens // 256) * 256)

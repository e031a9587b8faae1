"""Text from prompts: one, a file of them, or a conversation whose buffer goes on from turn to turn.

`python -m retention_jax.generate` is the command line of this.
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.generation import pictures, sampling
from retention_jax.generation.runs import generate
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Row, ids_of
from retention_jax.text import chat
from retention_jax.text.chat import Message
from retention_jax.text.tokenizer import Tokenizer
from retention_jax.vision.prompt import Patches


class Writer(NamedTuple):
    """A model with everything that says how it writes."""

    model: Decoder
    tokenizer: Tokenizer
    cache: CacheConfig
    max_new_tokens: int
    drawing: dict[str, Any]  # temperature, top_k, top_p, min_p
    seed: int
    template: bool  # whether prompts go through the chat template
    system: str  # system message of prompts that have none; "" adds none
    template_kwargs: dict[str, Any]
    control_tokens: bool = True  # whether text like <|im_end|> in a prompt is the control token; else it is refused
    processor: Any = None  # a `vision.processor.Processor`, how pictures are prepared; None for models of text


def check(writer: Writer) -> None:
    """Warns of what the checkpoint asks for and nobody does (`chat.reply_warnings`).

    Raises:
      ValueError: when tokenizer and model do not go together, or settings are out of range.
    """
    rows, needed = writer.model.config.vocab_size, writer.tokenizer.vocab_size
    if needed > rows:
        raise ValueError(f"{writer.tokenizer.where}: the tokenizer has {needed} tokens, but the model only {rows}")
    if writer.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {writer.max_new_tokens}")
    sampling.settings(**writer.drawing)
    for warning in chat.reply_warnings(writer.tokenizer, templated=writer.template):
        logging.warning("%s", warning)


def warn_of_length(writer: Writer, where: str, lengths: Sequence[int]) -> None:
    """Warns when prompts of so many tokens are longer than what the model was made for."""
    context = writer.model.config.context
    if over := [length for length in lengths if length > context]:
        logging.warning(
            "%s: %d of %d prompts are longer than the %d tokens that the model was made for (config.json, "
            "max_position_embeddings); the longest has %d. What is written after them may make no sense",
            where,
            len(over),
            len(lengths),
            context,
            max(over),
        )


def drawing_settings(generation: Mapping[str, Any], given: Mapping[str, float | int | None]) -> dict[str, Any]:
    """How tokens are drawn: what was given (not None), else what generation_config.json says.

    A file without `do_sample: true` stands for greedy decoding, whatever else is in it. A top_k, top_p or min_p that
    was given asks for drawing all the same, as `do_sample` does: at the file's temperature, or at 1.
    """
    found = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    given = {name: value for name, value in given.items() if value is not None}
    cuts = any(value != found[name] for name, value in given.items() if name != "temperature")
    if generation.get("do_sample") or cuts:
        found |= {name: generation[name] for name in found if generation.get(name) is not None}
    else:
        found["temperature"] = 0.0
    if cuts and not found["temperature"]:
        found["temperature"] = 1.0
    found |= given
    return {name: int(value) if name == "top_k" else float(value) for name, value in found.items()}


_NOT_SETTINGS = ("model", "tokenizer", "cache", "processor")  # what the names of a run's folders tell, and the cache


def run_id(writer: Writer, names: Mapping[str, str]) -> str:
    """A short name of everything that the text depends on beside the prompt; `names` tell the model."""
    values = {
        "cache": dataclasses.asdict(writer.cache),
        **{name: getattr(writer, name) for name in writer._fields if name not in _NOT_SETTINGS},
        **names,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class Totals(NamedTuple):
    """What the closing line tells, summed over batches; bytes are those of the batch that held most."""

    prompt_tokens: float = 0.0
    new_tokens: float = 0.0
    decode_seconds: float = 0.0
    live: float = 0.0
    full_live: float = 0.0
    kv_bytes: float = 0.0
    full_kv_bytes: float = 0.0

    def add(self, stats: Mapping[str, float]) -> "Totals":
        sums = {name: getattr(self, name) + stats[name] for name in self._fields if not name.endswith("kv_bytes")}
        most = {name: max(getattr(self, name), stats[name]) for name in ("kv_bytes", "full_kv_bytes")}
        return Totals(**sums, **most)

    def line(self) -> str:
        speed = self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0
        return (
            f"{self.prompt_tokens:,.0f} prompt tokens, {self.new_tokens:,.0f} new tokens, "
            f"{speed:,.1f} tokens/s with compiling; "
            f"kept {self.live:,.0f} of {self.full_live:,.0f} entries; "
            f"KV {self.kv_bytes / 2**20:,.2f} MiB, a full cache {self.full_kv_bytes / 2**20:,.2f} MiB"
        )


def prompt_tokens(
    writer: Writer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Row:
    """Tokens of a text, or of the messages before a reply; with their pictures, where they have any.

    Args:
      writer: holds the tokenizer and how prompts are written.
      prompt: what the user says, or all messages.
      system: system message of this prompt, in place of the writer's.
      tools: JSON schemas of functions, for the template.

    Raises:
      ValueError: when there is nothing to read, and as `chat.render`, `Tokenizer.encode` and `pictures.opened` do.
    """
    if writer.template:
        text, media = _rendered(writer, prompt, system, tools)
        if media:
            return pictures.encoded(writer.tokenizer, writer.model.config.vision, text, media)
        ids = writer.tokenizer.encode(text, bos=False)
    else:
        check_control_tokens(writer, [prompt, system])
        if not isinstance(prompt, str) or system or tools:
            raise ValueError(
                "messages need the chat template, and so do system and tools; only plain text can go without"
            )
        ids = writer.tokenizer.encode(prompt, bos=True)
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def prompt_text(
    writer: Writer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[Patches]]:
    """What the chat template makes of the messages before a reply; arguments and errors as in `prompt_tokens`.

    Returns:
      The text, with a placeholder for each feature of a picture, and the pictures.
    """
    text, media = _rendered(writer, prompt, system, tools)
    return pictures.expanded(writer.tokenizer, writer.model.config.vision, text, media), media


def _rendered(
    writer: Writer,
    prompt: str | Sequence[Message],
    system: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[str, list[Patches]]:
    """The text, and the pictures and clips that it has places for."""
    told = [prompt] if isinstance(prompt, str) else [m.get("content") for m in prompt if isinstance(m, Mapping)]
    check_control_tokens(writer, [*told, system])
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    messages = chat.with_system(messages, system) if system else _with_system(writer, messages)
    plain, media = pictures.opened(writer.tokenizer, writer.processor, messages)
    text = chat.render(
        writer.tokenizer, plain, add_generation_prompt=True, tools=tools, template_kwargs=writer.template_kwargs
    )
    return text, media


def check_control_tokens(writer: Writer, texts: Sequence[Any]) -> None:
    """Raises ValueError where a text holds a control token and the writer does not let it."""
    if writer.control_tokens:
        return
    found = [token for token in writer.tokenizer.special_strings() if any(token in str(text) for text in texts)]
    if found:
        raise ValueError(
            f"the prompt has the text of control tokens: {', '.join(sorted(found))}; --control_tokens lets it be them"
        )


def _with_system(writer: Writer, messages: list[Message]) -> list[Message]:
    has_one = any(isinstance(m, Mapping) and m.get("role") == "system" for m in messages)
    return messages if has_one or not writer.system else chat.with_system(messages, writer.system)


class Reply(NamedTuple):
    tokens: list[int]
    stats: dict[str, float]
    buffer: Buffer


def reply(
    writer: Writer,
    tokens: Row,
    write: Callable[[str], object],
    *,
    seed: int,
    buffer: Buffer | None = None,
) -> Reply:
    """Continues one sequence, and hands its text to `write` as it comes, in whole characters; Ctrl-C ends it."""
    warn_of_length(writer, "prompt", [len(ids_of(tokens)) + (0 if buffer is None else int(np.asarray(buffer.seen)[0]))])
    text_of = writer.tokenizer.stream()
    with _interruptible() as interrupted:

        def on_tokens(rows: list[list[int]]) -> bool:
            write(text_of(rows[0]))
            return interrupted()

        out = generate(
            writer.model,
            [tokens],
            writer.cache,
            max_new_tokens=writer.max_new_tokens,
            seed=seed,
            **writer.drawing,
            stop_tokens=writer.tokenizer.stop_tokens,
            buffer=buffer,
            on_tokens=on_tokens,
        )
    if rest := text_of([], end=True):
        write(rest)
    return Reply(out.tokens[0], out.stats, out.buffer)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C was pressed: one ends the reply, a second one the program."""
    pressed = threading.Event()

    def handle(number: int, frame: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set  # signals are for the main thread
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation(NamedTuple):
    """The turns until now, without their pixels, and the buffer that holds their tokens, all but the last one."""

    messages: list[Message] = []
    last: int = -1
    buffer: Buffer | None = None


def turn_tokens(
    writer: Writer, before: Conversation, content: str | Sequence[Mapping[str, Any]]
) -> tuple[list[Message], Row]:
    """The messages until the next reply, and those of their tokens that the buffer does not hold yet.

    Args:
      writer: the model and how it writes.
      before: the turns until now.
      content: what the user says: a text, or parts with pictures.

    Raises:
      ValueError: as `prompt_tokens` and `chat.continuation` do.
    """
    check_control_tokens(writer, [content])
    new, media = pictures.opened(writer.tokenizer, writer.processor, [{"role": "user", "content": content}])
    messages = [*before.messages, *new]
    if before.buffer is None:
        messages = _with_system(writer, messages)
        if not media:
            return messages, prompt_tokens(writer, messages)
        text = chat.render(
            writer.tokenizer, messages, add_generation_prompt=True, template_kwargs=writer.template_kwargs
        )
        return messages, pictures.encoded(writer.tokenizer, writer.model.config.vision, text, media)
    closing, after = chat.continuation(
        writer.tokenizer, messages, len(messages) - 2, template_kwargs=writer.template_kwargs
    )
    # The closing stands in for the stop token, unless there is none, or the reply was cut off before it.
    begin = [] if closing and before.last in writer.tokenizer.stop_tokens else [before.last]
    if media:
        vision = writer.model.config.vision
        return messages, pictures.encoded(writer.tokenizer, vision, closing + after, media, begin=begin)
    return messages, [*begin, *writer.tokenizer.encode_more(closing + after)]


def take_turn(
    writer: Writer, before: Conversation, messages: list[Message], tokens: Row, write: Callable[[str], object]
) -> tuple[Conversation, dict[str, float]]:
    """One turn of a conversation, with what `turn_tokens` gave; only these tokens are read, on top of the buffer."""
    turn = sum(m["role"] == "assistant" for m in messages)
    out = reply(writer, tokens, write, seed=writer.seed + turn, buffer=before.buffer)
    messages = [*messages, {"role": "assistant", "content": writer.tokenizer.decode(out.tokens)}]
    return Conversation(messages, out.tokens[-1], out.buffer), out.stats


def converse(
    writer: Writer,
    lines: Iterable[str],
    write: Callable[[str], object],
    shown: Sequence[Mapping[str, Any]] = (),
) -> Totals:
    """A conversation with whoever writes the lines. `/reset` forgets it, `/exit` ends it, as the end of lines does.

    `/image PATH` and `/video PATH` show something with the next line that is said, before its text; `shown` are such
    parts for the first one. A line that cannot be read, or that the template refuses, is answered on standard error,
    and does not count, nor what it showed.
    """
    totals, conversation, shown = Totals(), Conversation(), list(shown)
    for line in map(str.strip, lines):
        command, _, path = line.partition(" ")
        if line == "/exit":
            break
        if line == "/reset":
            conversation, shown = Conversation(), []
        elif command in ("/image", "/video"):
            shown.append({"type": command[1:], command[1:]: path.strip()})
        elif line:
            said, shown = [*shown, {"type": "text", "text": line}] if shown else line, []
            try:
                messages, tokens = turn_tokens(writer, conversation, said)
            except (ValueError, ImportError) as error:
                print(error, file=sys.stderr, flush=True)
                continue
            conversation, stats = take_turn(writer, conversation, messages, tokens, write)
            write("\n")
            totals = totals.add(stats)
    return totals

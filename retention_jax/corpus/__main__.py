"""Writes training data for gates, as JSON lines that `configs/chat.py` and `configs/smollm2.py` read.

    python -m retention_jax.corpus --kind=facts --texts=BOOK.txt,MORE.txt --tokenizer=MODEL --documents=2000 \\
        --shortest=300 --longest=1000 --output=facts.jsonl --heldout=heldout.jsonl
    python -m retention_jax.corpus --kind=text --texts=BOOK.txt,MORE.txt --tokenizer=MODEL --documents=300 \\
        --shortest=300 --longest=1000 --output=text.jsonl
    python -m retention_jax.corpus --kind=answers --model=MODEL --prompts=QUESTIONS.jsonl --answers=1000 \\
        --output=answers.jsonl

facts      conversations about passages of the texts, with facts put in and asked for later (`documents.py`)
text       passages of the texts
answers    what the model itself answers to prompts, with a full cache (`answers.py`)

A text is a plain file, or rows with a field `text`. The same arguments write the same file. Files of facts and text are
whole or not there; a file of answers grows, and goes on when the command is started again.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import app, flags, logging

from retention_jax.config import CacheConfig
from retention_jax.corpus import answers, documents, passages
from retention_jax.corpus.documents import Lengths
from retention_jax.corpus.passages import Piece
from retention_jax.generation import conversation
from retention_jax.generation.conversation import Writer
from retention_jax.models import weights
from retention_jax.runtime import command, files, hub
from retention_jax.text import chat, tokenizer
from retention_jax.text.chat import Message

SHORTEST = 200  # of `Lengths`: a fact, a question and a few sentences
NARROWEST = 50  # longest - shortest
_OF_KIND = {
    "facts": ("texts", "documents"),
    "text": ("texts", "documents"),
    "answers": ("model", "prompts", "answers"),
}
_TRAIN, _HELDOUT = 0, 1  # parts of the seed


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    text, number, real = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
    )
    flags.DEFINE_enum("kind", "facts", list(_OF_KIND), "What is written.", flag_values=values)
    text("output", None, "JSON lines to write.")
    number("seed", 0, "Not negative.", lower_bound=0)

    flags.DEFINE_list("texts", None, "facts, text: the texts, with commas between them.", flag_values=values)
    number("documents", None, "facts, text: how many.", lower_bound=1)
    number("shortest", 1500, "facts, text: length of the shortest document.")
    number("longest", 6000, "facts, text: length of the longest document.")
    text("tokenizer", None, "facts, text: model in whose tokens lengths are counted, all included; else characters.")
    text("heldout", None, "facts, text: a second file, made of the texts' last parts, which the first one then lacks.")
    number("heldout_documents", 64, "facts, text: documents of the second file.", lower_bound=1)
    real("heldout_share", 0.1, "facts, text: share of every text that is for the second file.", 0.01, 0.9)

    text("model", None, "answers: folder of a Hugging Face checkpoint with its tokenizer, or a hub name.")
    text("prompts", None, "answers: rows with `turns`, `question` or `prompt`.")
    number("answers", None, "answers: conversations in the file; prompts are used again after the last.", lower_bound=1)
    text("dtype", "bfloat16", "answers: of weights and cache: bfloat16 or float32.")
    number("max_new_tokens", 512, "answers: of each.")
    real("temperature", 0.7, "answers: 0 is greedy.")
    real("top_p", 0.95, "answers: draw from the fewest likeliest tokens of this probability together.")
    number("batch_size", 8, "answers: conversations written together.", lower_bound=1)
    flags.mark_flag_as_required("output", flag_values=values)


def write_documents(values: flags.FlagValues) -> None:
    """Writes conversations with facts, or plain text.

    Raises:
      ValueError: on lengths out of range, and as `passages.read` and `tokenizer.load` do.
    """
    lengths = make_lengths(values.shortest, values.longest, values.tokenizer)
    make = documents.conversation if values.kind == "facts" else documents.text
    texts = [passages.read(source) for source in values.texts]
    if values.heldout is None:
        _write(values.output, make, texts, lengths, (values.seed, _TRAIN), values.documents)
        return
    train, heldout = passages.split(texts, values.heldout_share)
    if bad := [source for source, *parts in zip(values.texts, train, heldout, strict=True) if not all(parts)]:
        raise ValueError(f"{', '.join(bad)}: too short for heldout_share={values.heldout_share}")
    _write(values.output, make, train, lengths, (values.seed, _TRAIN), values.documents)
    _write(values.heldout, make, heldout, lengths, (values.seed, _HELDOUT), values.heldout_documents)


def make_lengths(shortest: int, longest: int, tokenizer_name: str | None) -> Lengths:
    """Lengths in characters; with a tokenizer, in its tokens, those of the chat template included.

    Raises:
      ValueError: when they are too short or too close, and as `tokenizer.load` does.
    """
    problems = [f"shortest must be at least {SHORTEST}, got {shortest}"] * (shortest < SHORTEST)
    problems += [f"longest must be at least shortest + {NARROWEST} = {shortest + NARROWEST}, got {longest}"] * (
        longest < shortest + NARROWEST
    )
    if problems:
        raise ValueError("; ".join(problems))
    if tokenizer_name is None:
        return Lengths(shortest, longest, len, lambda messages: sum(len(m["content"]) for m in messages))
    known = tokenizer.load(hub.resolve(tokenizer_name))

    def of_messages(messages: list[Message]) -> int:
        text = chat.render(known, messages, add_generation_prompt=False)
        return len(known.encode(text, bos=False))

    return Lengths(shortest, longest, lambda text: len(known.encode(text, bos=False)), of_messages)


def _write(
    output: str,
    make: Callable[..., dict[str, Any]],
    texts: Sequence[Sequence[Piece]],
    lengths: Lengths,
    seed: tuple[int, int],
    count: int,
) -> None:
    """Document i depends on the seed and on i, not on how many there are."""
    path = pathlib.Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: pathlib.Path) -> None:
        with temporary.open("wb") as file:
            for i in tqdm.trange(count, desc=path.name, unit="document", disable=None):
                file.write(files.json_line(make(np.random.default_rng((*seed, i)), texts, lengths)) + b"\n")

    files.write_atomically(path, write)


def write_answers(values: flags.FlagValues) -> None:
    """Writes the model's own answers.

    Raises:
      ValueError: as `answers.read_prompts` and `answers.write` do, and as loading does.
    """
    prompts = answers.read_prompts(values.prompts)
    folder = hub.resolve(values.model)
    writer = Writer(
        model=weights.load(folder, None, values.dtype),
        tokenizer=tokenizer.load(folder),
        cache=CacheConfig.full(1),  # `answers.write` makes room for each batch
        max_new_tokens=values.max_new_tokens,
        drawing={"temperature": values.temperature, "top_k": 0, "top_p": values.top_p, "min_p": 0.0},
        seed=values.seed,
        template=True,
        system="",
        template_kwargs={},
    )
    conversation.check(writer)
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    run = conversation.run_id(writer, {"model": values.model, "dtype": values.dtype, "prompts": digest})
    path = pathlib.Path(values.output).expanduser()
    answers.write(writer, prompts, path, values.answers, values.batch_size, run)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    needed = _OF_KIND[values.kind]
    others = {name for names in _OF_KIND.values() for name in names} - set(needed)
    problems = [f"--kind={values.kind} needs --{name}" for name in needed if not values[name].value]
    problems += [f"--{name} does not go with --kind={values.kind}" for name in sorted(others) if values[name].present]
    if problems:
        raise ValueError("; ".join(problems))
    (write_answers if values.kind == "answers" else write_documents)(values)


if __name__ == "__main__":
    command.run(main, define_flags)

"""Text under a budget: one prompt, a file of prompts, or a conversation.

    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --prompt="Why is the sky blue?"
    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --prompts=in.jsonl --output=out.jsonl
    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --chat

Text goes to standard output as it comes, a closing line about speed and memory to standard error. No module imports
this one, whose name is that of a function of the package.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import app, flags, logging

from retention_jax.config import CacheConfig, conversion
from retention_jax.generation import conversation, prompt_files
from retention_jax.generation.conversation import Totals, Writer
from retention_jax.models import weights
from retention_jax.runtime import hub, program_cache
from retention_jax.text import tokenizer


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    text, number, real, switch = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool)
    )
    text("model", None, "Folder of a Hugging Face checkpoint with its tokenizer, or a hub name.")
    text("gates", None, "Gate folder; policy 'retention' needs one.")
    text("dtype", "bfloat16", "Of weights and cache: bfloat16 or float32.")

    text("prompt", None, "Text to continue.")
    text("prompts", None, "JSON lines with `prompt` or `messages`; goes with --output.")
    text("output", None, "JSON lines to write; goes on where an earlier run was stopped.")
    switch("chat", False, "Converse: one line, one turn. /reset forgets, /exit ends, Ctrl-C ends a reply.")
    number("batch_size", 8, "Prompts of a file read together.")

    switch("raw", False, "Prompts are plain text, without the chat template.")
    text("system", "", "System message of prompts that have none.")
    switch("enable_thinking", None, "Given to the chat template.")
    text("template_kwargs", "{}", "JSON object of more values for the chat template.")

    number("max_new_tokens", 512, "Of each reply.")
    real("temperature", None, "0 is greedy. Default, as of the next three: generation_config.json, else greedy.")
    number("top_k", None, "Draw from so many likeliest tokens; 0 from all.")
    real("top_p", None, "Draw from the fewest likeliest tokens of this probability together.")
    real("min_p", None, "Draw from tokens of at least this share of the likeliest one's probability.")
    number("seed", 0, "Of the draws, and of the random policy.")

    number("budget", None, "Average kept entries per layer and head.")
    number("recent", CacheConfig.recent, "Tokens between two evictions.")
    text("policy", CacheConfig.policy, "Eviction score.")
    number("prefill_chunk", CacheConfig.prefill_chunk, "Prompt tokens read at a time; all by default.")
    number("protect_first", CacheConfig.protect_first, "First tokens that stay in every head.")
    number("protect_last", CacheConfig.protect_last, "Last tokens that stay in every head.")
    number("min_per_head", CacheConfig.min_per_head, "Best entries that every head keeps.")
    real("threshold", CacheConfig.threshold, "Keep only scores of at least the log of this.")
    number("horizon", CacheConfig.horizon, "Steps of future use that the retention score counts.")
    switch("local", CacheConfig.local, "The budget for each layer and head, not for all together.")
    number("observe", CacheConfig.observe, "Newest queries that vote, in policies of SnapKV's kind.")
    number("pool_width", CacheConfig.pool_width, "Neighbouring entries that share a vote, in the same policies.")
    flags.mark_flags_as_required(["model", "budget"], flag_values=values)


def make_writer(values: flags.FlagValues) -> Writer:
    """Model, tokenizer and settings of the flags.

    Raises:
      ValueError: when flags do not go together or are out of range, and as loading does.
    """
    sources = [name for name in ("prompt", "prompts", "chat") if values[name].value not in (None, False)]
    if len(sources) != 1 or (values.output is None) != (values.prompts is None):
        raise ValueError("give one of --prompt, --chat, or --prompts together with --output")
    if values.chat and values.raw:
        raise ValueError("--chat goes through the chat template, which --raw leaves out")
    cache = conversion.from_dict(
        CacheConfig, {field.name: values[field.name].value for field in dataclasses.fields(CacheConfig)}, "flags"
    )
    if cache.policy == "retention" and not values.gates:
        raise ValueError("policy 'retention' needs --gates; the other policies do not")
    folder = hub.resolve(values.model)
    tok = tokenizer.load(folder)  # before the weights: what is wrong with it shows at once
    writer = Writer(
        model=weights.load(folder, values.gates, values.dtype),
        tokenizer=tok,
        cache=cache,
        max_new_tokens=values.max_new_tokens,
        drawing=conversation.drawing_settings(
            tok.generation, {name: values[name].value for name in ("temperature", "top_k", "top_p", "min_p")}
        ),
        seed=values.seed,
        template=not values.raw,
        system=values.system,
        template_kwargs=_template_kwargs(values),
    )
    conversation.check(writer)
    return writer


def _template_kwargs(values: flags.FlagValues) -> dict[str, object]:
    try:
        given = json.loads(values.template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--template_kwargs is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--template_kwargs must be a JSON object, got {given!r}")
    return given if values.enable_thinking is None else {**given, "enable_thinking": values.enable_thinking}


def _write(text: str) -> None:
    if jax.process_index() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def _typed_lines() -> Iterator[str]:
    """Lines of standard input; with editing and history where it is a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    import readline  # noqa: F401  # importing it is what makes input() edit; it must not write into a pipe

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    writer = make_writer(values)
    if values.chat:
        totals = conversation.converse(writer, _typed_lines(), _write)
    elif values.prompts is not None:
        source, output = (pathlib.Path(path).expanduser() for path in (values.prompts, values.output))
        run = conversation.run_id(writer, {name: values[name].value or "" for name in ("model", "gates", "dtype")})
        prompts = prompt_files.read_prompts(writer, source)
        totals = prompt_files.write_results(writer, prompts, output, values.batch_size, run)
    else:
        tokens = conversation.prompt_tokens(writer, values.prompt)
        totals = Totals().add(conversation.reply(writer, tokens, _write, seed=writer.seed).stats)
        _write("\n")
    if jax.process_index() == 0:
        print(totals.line(), file=sys.stderr)


if __name__ == "__main__":
    jax.config.config_with_absl()
    program_cache.keep_programs()
    define_flags(flags.FLAGS)
    app.run(main)

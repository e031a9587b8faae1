"""Text under a budget: one prompt, a file of prompts, or a conversation.

    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --prompt="Why is the sky blue?"
    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --prompts=in.jsonl --output=out.jsonl
    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --chat
    python -m retention_jax.generate --model=FOLDER --gates=FOLDER --budget=512 --image=FILE --prompt="What is this?"

Text goes to standard output as it comes, a closing line about speed and memory to standard error. One process does it
all, on one device or, with --mesh=tensor:8, on all of its devices. No module imports this one, whose name is that of a
function of the package.
"""

import functools
import io
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

from retention_jax.config import MeshConfig
from retention_jax.generation import cache_flags, conversation, prompt_files
from retention_jax.generation.conversation import Totals, Writer
from retention_jax.models import huggingface, weights
from retention_jax.parallel import sharding
from retention_jax.policies.table import POLICIES
from retention_jax.runtime import command, hub
from retention_jax.text import tokenizer
from retention_jax.vision import processor


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    text, number, real, switch = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool)
    )
    text("model", None, "Folder of a Hugging Face checkpoint with its tokenizer, or a hub name.")
    text("gates", None, "Gate folder, hub name or builtin:NAME; policies that rank by gates need one.")
    text("dtype", "bfloat16", "Of weights and cache: bfloat16 or float32.")
    text("mesh", "", "Axes and sizes, data:2,tensor:4, that multiply to the number of devices; empty for one device.")

    text("prompt", None, "Text to continue.")
    shown = "Shown before --prompt's text, or what is said first in --chat; can be given several times."
    flags.DEFINE_multi_string("image", [], f"A picture. {shown}", flag_values=values)
    flags.DEFINE_multi_string("video", [], f"A film, or a folder of frames. {shown}", flag_values=values)
    text("prompts", None, "JSON lines with `prompt` or `messages`; goes with --output.")
    text("output", None, "JSON lines to write; goes on where an earlier run was stopped.")
    switch("chat", False, "Converse: one line, one turn. /image PATH shows, /reset forgets, /exit ends.")
    number("batch_size", 8, "Prompts of a file read together.")

    switch("raw", False, "Prompts are plain text, without the chat template.")
    control = "Text like <|im_end|> in a prompt is the control token, as in transformers; without, it is refused."
    switch("control_tokens", True, control)
    text("system", "", "System message of prompts that have none.")
    switch("enable_thinking", None, "Given to the chat template.")
    text("template_kwargs", "{}", "JSON object of more values for the chat template.")

    number("max_new_tokens", 512, "Of each reply.")
    real("temperature", None, "0 is greedy. Default, as of the next three: generation_config.json, else greedy.")
    number("top_k", None, "Draw from so many likeliest tokens; 0 from all.")
    real("top_p", None, "Draw from the fewest likeliest tokens of this probability together.")
    real("min_p", None, "Draw from tokens of at least this share of the likeliest one's probability.")

    cache_flags.define(values)
    flags.mark_flags_as_required(["model", "budget"], flag_values=values)


def make_writer(values: flags.FlagValues) -> Writer:
    """Model, tokenizer and settings of the flags.

    Raises:
      ValueError: when flags do not go together or are out of range, and as loading does.
    """
    sources = [name for name in ("prompt", "prompts", "chat") if values[name].value not in (None, False)]
    if len(sources) != 1 or (values.output is None) != (values.prompts is None):
        raise ValueError("give one of --prompt, --chat, or --prompts together with --output")
    if values.raw and (values.chat or values.image or values.video):
        raise ValueError("--chat, --image and --video go through the chat template, which --raw leaves out")
    if values.prompts is not None and (values.image or values.video):
        raise ValueError("--image and --video go with --prompt or --chat; lines of --prompts have messages with parts")
    cache = cache_flags.read(values)
    mesh = make_mesh(values)
    folder = hub.resolve(values.model)
    tok = tokenizer.load(folder)  # before the weights: what is wrong with it shows at once
    vision = huggingface.read_model_config(folder, values.dtype).vision
    if vision is None and (values.image or values.video):
        raise ValueError(f"--image and --video need a model with a vision tower, which {folder} has not")
    writer = Writer(
        model=weights.load(folder, values.gates, values.dtype, mesh=mesh),
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
        control_tokens=values.control_tokens,
        processor=None if vision is None else processor.read(folder, vision),
    )
    conversation.check(writer)
    if values["seed"].present and not writer.drawing["temperature"] and not POLICIES[cache.policy].seeded:
        logging.warning("--seed changes nothing: tokens are greedy (--temperature, --top_p), and so is the policy")
    return writer


def make_mesh(values: flags.FlagValues) -> Mesh | None:
    """The mesh of --mesh; None without one.

    Raises:
      ValueError: as MeshConfig does, and when there are fewer prompts at a time than the mesh's rows need.
    """
    if not values.mesh:
        return None
    sizes = MeshConfig.parse(values.mesh).over(jax.device_count())
    rows = sizes["data"] * sizes["fsdp"]
    if rows > 1 and values.prompts is None:
        raise ValueError(f"--prompt and --chat read one text at a time: mesh data and fsdp must be 1, got {rows}")
    if values.batch_size % rows:
        raise ValueError(f"--batch_size must be a multiple of mesh data * fsdp = {rows}, got {values.batch_size}")
    return sharding.make_mesh(**sizes)


def _template_kwargs(values: flags.FlagValues) -> dict[str, object]:
    try:
        given = json.loads(values.template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--template_kwargs is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--template_kwargs must be a JSON object, got {given!r}")
    return given if values.enable_thinking is None else {**given, "enable_thinking": values.enable_thinking}


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal of ASCII gets a ? for what it cannot show
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _typed_lines() -> Iterator[str]:
    """Lines of standard input; with editing and history where it is a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 are refused with their line
        sys.stdin.reconfigure(errors="surrogateescape")
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
    shown = [{"type": kind, kind: path} for kind in ("image", "video") for path in values[kind].value or ()]
    if values.chat:
        totals = conversation.converse(writer, _typed_lines(), _write, shown)
    elif values.prompts is not None:
        source, output = (pathlib.Path(path).expanduser() for path in (values.prompts, values.output))
        run = conversation.run_id(writer, {name: values[name].value or "" for name in ("model", "gates", "dtype")})
        prompts = prompt_files.read_prompts(writer, source)
        totals = prompt_files.write_results(writer, prompts, output, values.batch_size, run)
    else:
        said = [*shown, {"type": "text", "text": values.prompt}]
        prompt = [{"role": "user", "content": said}] if shown else values.prompt
        tokens = conversation.prompt_tokens(writer, prompt)
        totals = Totals().add(conversation.reply(writer, tokens, _write, seed=writer.seed).stats)
        _write("\n")
    print(totals.line(), file=sys.stderr)


if __name__ == "__main__":
    command.run(main, define_flags)

"""An OpenAI-compatible server of one model, whose memory does not grow with what it reads.

    python -m retention_jax.serve --model=FOLDER --gates=FOLDER --budget=512 --rows=16

It listens on http://127.0.0.1:8000: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready, /metrics, and a
page to try it at /. Each request has a row of the buffer, which costs the same whatever its context. It runs in one
process, on one device or, with --mesh=tensor:8, on all of its devices.
"""

import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

from retention_jax.cache import full_nbytes
from retention_jax.config import MeshConfig
from retention_jax.evaluation.rows import in_bytes
from retention_jax.generation import cache_flags, conversation
from retention_jax.generation.conversation import Writer
from retention_jax.models import huggingface, weights
from retention_jax.parallel import sharding
from retention_jax.runtime import command, hub
from retention_jax.serving import keys, listening, token_text
from retention_jax.serving.engine import Engine
from retention_jax.serving.metrics import Metrics
from retention_jax.serving.rows import row_nbytes
from retention_jax.serving.service import Service
from retention_jax.serving.sessions import Sessions
from retention_jax.serving.transcripts import Transcripts
from retention_jax.text import tokenizer
from retention_jax.vision import processor
from retention_jax.vision.pixels import Limits
from retention_jax.vision.processor import Processor


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    text, number, real, switch = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool)
    )
    text("model", None, "Folder of a Hugging Face checkpoint with its tokenizer, or a hub name.")
    text("gates", None, "Gate folder; policies that rank by gates need one.")
    text("dtype", "bfloat16", "Of weights and cache: bfloat16 or float32.")
    text("mesh", "", "tensor:8 or the like, over all devices; empty for one device.")
    text("name", None, "What clients call the model; the last part of --model by default.")

    number("rows", 8, "Requests that are answered at a time.")
    number("queue", 64, "Requests that may wait beside them; more get 429.")
    real("time_limit", 600.0, "Seconds until a request is given up, waiting included.")
    real("drain_seconds", 30.0, "How long requests may go on after SIGTERM.")
    number("max_new_tokens", 512, "Of each reply that does not say its own.")
    number("picture_tokens", 1024, "Most that a picture is read as; larger ones are made smaller. 0 takes no pictures.")

    text("host", "127.0.0.1", "Address to listen on; only this machine reaches the default.")
    number("port", 8000, "Port to listen on; 0 for any that is free.")
    text("api_keys", None, "File with the keys that clients must have one of, one a line; without, everybody may ask.")

    real("session_memory", 1.0, "GiB of host memory for parked conversations; 0 for none.")
    real("session_disk", 0.0, "GiB of files for parked conversations; goes with --session_dir.")
    text("session_dir", None, "Folder of these files, for this server alone. They outlive it.")

    text("system", "", "System message of conversations that have none.")
    text("template_kwargs", "{}", "JSON object of values for the chat template, such as enable_thinking.")
    control = "Text like <|im_end|> in a prompt is the control token, as in transformers; without, it is refused."
    switch("control_tokens", True, control)
    cache_flags.define(values, prefill_chunk=256)
    flags.mark_flags_as_required(["model", "budget"], flag_values=values)


def make_service(values: flags.FlagValues) -> Service:
    """Everything of the flags, loaded; the engine has not started.

    Raises:
      ValueError: when flags do not go together or are out of range, and as loading does.
    """
    cache, kwargs = cache_flags.read(values), _template_kwargs(values)
    _check(values)
    known = None if values.api_keys is None else keys.read(pathlib.Path(values.api_keys).expanduser())
    mesh = _mesh(values.mesh)
    folder = hub.resolve(values.model)
    tok, seeing = tokenizer.load(folder), _processor(folder, values)  # before the weights: what is wrong shows at once
    writer = Writer(
        model=weights.load(folder, values.gates, values.dtype, mesh=mesh),
        tokenizer=tok,
        cache=cache,
        max_new_tokens=values.max_new_tokens,
        drawing=conversation.drawing_settings(tok.generation, {}),
        seed=values.seed,
        template=True,
        system=values.system,
        template_kwargs=kwargs,
        control_tokens=values.control_tokens,
        processor=seeing,
    )
    conversation.check(writer)
    _tell_memory(writer, values.rows)
    engine = Engine(
        writer.model,
        cache,
        rows=values.rows,
        queue=values.queue,
        sessions=_sessions(values, writer),
        picture=0 if seeing is None else values.picture_tokens,
    )
    return Service(
        engine=engine,
        writer=writer,
        name=values.name or values.model.rstrip("/").rpartition("/")[2],
        most_sequences=values.rows + values.queue,
        time_limit=values.time_limit,
        keys=known,
        transcripts=Transcripts(tok),
        token_text=token_text.of(tok),
        metrics=Metrics(engine.stats),
        created=int(time.time()),
        draining=threading.Event(),
    )


def _processor(folder: pathlib.Path, values: flags.FlagValues) -> Processor | None:
    """How pictures are prepared, where the model reads them and the server takes them."""
    vision = huggingface.read_model_config(folder, values.dtype).vision
    if vision is None or not values.picture_tokens:
        return None
    found = processor.read(folder, vision)
    most = min(found.pictures.most, values.picture_tokens * vision.factor**2)
    if most < found.pictures.least:
        least = -(-found.pictures.least // vision.factor**2)
        raise ValueError(f"--picture_tokens must be at least {least} or 0, got {values.picture_tokens}")
    return found._replace(pictures=Limits(found.pictures.least, most))


def _mesh(text: str) -> Mesh | None:
    if not text:
        return None
    sizes = MeshConfig.parse(text).over(jax.device_count())
    if (rows := sizes["data"] * sizes["fsdp"]) > 1:
        raise ValueError(f"--mesh: prompts are read one by one, so data and fsdp must be 1, got {rows}")
    return sharding.make_mesh(**sizes)


def _check(values: flags.FlagValues) -> None:
    least = {"rows": 1, "queue": 1, "time_limit": 0.001, "drain_seconds": 0, "session_memory": 0, "session_disk": 0}
    least["picture_tokens"] = 0
    problems = [f"--{n} must be at least {v}, got {values[n].value}" for n, v in least.items() if values[n].value < v]
    if (values.session_dir is None) != (values.session_disk == 0):
        problems.append("--session_dir and --session_disk go together")
    if problems:
        raise ValueError("; ".join(problems))


def _template_kwargs(values: flags.FlagValues) -> dict[str, object]:
    try:
        given = json.loads(values.template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--template_kwargs is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--template_kwargs must be a JSON object, got {given!r}")
    return given


def _sessions(values: flags.FlagValues, writer: Writer) -> Sessions | None:
    if not values.session_memory and not values.session_disk:
        return None
    return Sessions(
        writer.model,
        writer.cache,
        host_bytes=int(values.session_memory * 2**30),
        folder=None if values.session_dir is None else pathlib.Path(values.session_dir).expanduser(),
        disk_bytes=int(values.session_disk * 2**30),
    )


def _tell_memory(writer: Writer, rows: int) -> None:
    """Says what a row costs and how many fit.

    Raises:
      ValueError: when not all rows do.
    """
    config, cache = writer.model.config, writer.cache
    row, free = row_nbytes(config, cache), _free_bytes(writer)
    slots = cache.budget + cache.recent
    heads, full = config.num_layers * config.num_kv_heads, full_nbytes(config, config.context)
    _say(
        f"a row: {in_bytes(row)} whatever its context, {slots:,} entries for each of {heads:,} heads on average; "
        f"a full cache of {config.context:,} tokens: {in_bytes(full)}"
    )
    _say(f"free beside the weights: {in_bytes(free)}, about {free // row:,} rows; {rows:,} are made")
    if rows > free // row:
        raise ValueError(f"--rows={rows} need {in_bytes(rows * row)}, but {in_bytes(free)} are free")


def _free_bytes(writer: Writer) -> int:
    """Memory of the model's devices that nothing holds; of the machine, where they are CPUs."""
    devices = {d for a in jax.tree.leaves(writer.model) if isinstance(a, jax.Array) for d in a.devices()}
    stats = [device.memory_stats() for device in devices]
    told = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    return sum(told) if told else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _warn_of_strangers(values: flags.FlagValues, sock: socket.socket) -> None:
    host = sock.getsockname()[0]
    if not host.startswith("127.") and host != "::1" and values.api_keys is None:
        logging.warning("everybody who reaches %s may ask: there are no --api_keys", listening.url(sock))


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with listening.bind(values.host, values.port) as sock:
        service = make_service(values)
        _warn_of_strangers(values, sock)
        _say(f"{service.name} at {listening.url(sock)}: compiling")
        return listening.run(service, sock, values.drain_seconds, _say)


if __name__ == "__main__":
    command.run(main, define_flags)

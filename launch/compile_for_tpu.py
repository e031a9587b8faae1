"""Compiles the programs of a config for TPUs that are not there, and says what they would take.

    python launch/compile_for_tpu.py --config=configs/qwen3_4b_long.py --topology=v5p:2x2x4 --mesh=fsdp:4,context:4
    python launch/compile_for_tpu.py --config=configs/qwen3_4b_long.py --topology=v5e:4x4 --mesh=fsdp:16 \\
        --length=32768 --batch=16 --price_per_chip_hour=1.2
    python launch/compile_for_tpu.py --config=configs/qwen3_math.py:14b --topology=v6e:2x4 --mesh=tensor:8 \\
        --program=decode --batch=64 --budget=1024

Needs the libtpu wheel and no TPU, network or weights: the true program is lowered from shapes, with the TPU kernels,
for every chip of the topology, and the compiler says whether it fits. Programs: `train`, a step; `prefill`, a chunk of
a prompt with its eviction; `decode`, --recent tokens of every sequence and the eviction that follows them. Prints bytes
a device by kind, FLOPs, bytes of HBM, collectives, and the time that the slowest of the three takes at the chip's
published peaks: a floor that no run will reach. Then it compiles what suggestions.py thinks of: smaller batches,
rematerialisation and other meshes where it does not fit, larger batches and the like where there is room.
"""

import functools
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

# Before jax is imported: no TPU is looked for, and several compilers may run at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"RETENTION_JAX_KERNELS": "tpu"}

import chips
import hlo
import jax
import jax.numpy as jnp
import model_shapes
import suggestions
import tpu_report
from absl import app, flags
from flax import nnx
from jax.sharding import NamedSharding
from ml_collections import config_flags
from suggestions import Setup
from tpu_report import Part

from retention_jax import cache, train
from retention_jax.config import CacheConfig, MeshConfig, TrainConfig, conversion
from retention_jax.generation import decoding, runs
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam
from retention_jax.models.inputs import Inputs
from retention_jax.parallel import sharding
from retention_jax.runtime import command


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    text("topology", None, "Chips: v5e:4x4, v5p:2x2x4, v6e:2x4, tpu7x:2x2x1, ...")
    text("mesh", "", "In place of config.mesh: data:2,fsdp:2,context:4; axes not named are 1.")
    text("model", "", "In place of config.backbone: a name in model_shapes.py, or a folder.")
    programs = ["train", "prefill", "decode"]
    flags.DEFINE_enum("program", "train", programs, "What to compile.", flag_values=values)
    number("budget", 1024, "Kept entries per layer and head, where not training.")
    number("recent", 128, "Tokens between two evictions.")
    number("prefill_chunk", 1024, "Tokens of a prompt that are read at a time.")
    number("batch", None, "In place of config.data.batch_size; sequences, where not training.")
    number("length", None, "In place of config.data.length.")
    what = "For the cost of a million tokens."
    flags.DEFINE_float("price_per_chip_hour", None, what, lower_bound=0.0, flag_values=values)
    what = "Compile changed set-ups too, until one fits or uses what is free."
    flags.DEFINE_bool("suggest", True, what, flag_values=values)
    text("output", "", "JSON file to write; empty writes none.")
    flags.mark_flags_as_required(["config", "topology"], flag_values=values)


# A buffer that is full, and scores of which none ties with the last one kept.
TRIPS = {"run": 1, "search_by_score": 32, "search_by_position": 0, "search_by_head": 0}
ASSUMED = "full buffers, so that the search for the lowest score kept takes 32 passes; no other score ties with it"


class Program(NamedTuple):
    lowered: jax.stages.Lowered
    held: dict[str, Any]  # shapes of what lies in memory between calls, by kind
    tokens: int  # that a call processes


def training(setup: Setup) -> Program:
    """The training step."""
    state, frozen, batch, _ = train.shapes_of_step(setup.config, setup.model)
    held = {"weights": frozen, "gates": state.params, "optimiser": state.opt_state, "batch": batch}
    return Program(train.lower_step(setup.config, setup.model), held, setup.batch * setup.config.data.length)


def inference(setup: Setup) -> Program:
    """A program over the buffer, its weights laid out so that no key or value travels."""
    mesh, batch = sharding.entered(), setup.batch
    place = lambda a, layout: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout)
    model = nnx.eval_shape(lambda: Decoder(setup.model, setup.config.gate, rngs=nnx.Rngs(0)))
    if mesh is not None:
        model = jax.tree.map(place, model, sharding.of_tree(mesh, model, sharding.DECODING))
    buffer = cache.shapes(setup.model, setup.cache, batch)
    _, gates, weights = nnx.split(model, GateParam, ...)
    held = {"weights": weights, "gates": gates, "buffer": buffer}
    if setup.program == "decode":
        run = setup.cache.recent
        return Program(runs.lower_run(model, buffer, run), held, batch * run)
    assert setup.cache.prefill_chunk is not None  # a flag with a default
    chunk = (batch, setup.cache.prefill_chunk)
    of_chunk = lambda dtype: jax.ShapeDtypeStruct(chunk, dtype, sharding=_layout(mesh, sharding.WINDOW))
    inputs = Inputs(of_chunk(jnp.int32), of_chunk(jnp.bool_))  # pyright: ignore[reportArgumentType]

    def hidden_of_chunk(model, inputs, buffer):
        read, buffer = decoding.read_chunk(model, inputs, buffer, prompt=True)
        return read.hidden, buffer

    lowered = jax.jit(hidden_of_chunk, donate_argnames="buffer").lower(model, inputs, buffer=buffer)
    return Program(lowered, held, math.prod(chunk))


def parts_of(setup: Setup, text: str) -> tuple[list[Part], int]:
    """What a compiled program does, and how many of its loops have an unknown length."""
    if setup.program != "decode":
        cost = hlo.cost(text, TRIPS)
        what = {"train": "a step", "prefill": "a chunk with its eviction"}[setup.program]
        return [Part(what, 1, cost)], cost.unknown_loops
    run = setup.cache.recent
    steps, whole = (hlo.cost(text, TRIPS | {"tokens": run, "evict": evict}) for evict in (0, 1))
    step, eviction = hlo.combined((1 / run, steps)), hlo.combined((1, whole), (-1, steps))
    return [Part("a token of every sequence", run, step), Part("an eviction", 1, eviction)], whole.unknown_loops


def _layout(mesh: jax.sharding.Mesh | None, spec: sharding.P) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, sharding.present(mesh, spec))


def make_mesh(topology: str, sizes: dict[str, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(chips.devices_of(topology), **sizes)


def bytes_on_a_device(tree: Any) -> int:
    part = lambda s: math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
    return sum(map(part, jax.tree.leaves(tree)))


def report(setup: Setup, topology: str) -> suggestions.Report:
    """Compiles; everything there is to say. `fits` is False where the compiler refuses for lack of memory."""
    started = time.perf_counter()
    chip = chips.of_topology(topology)
    with jax.set_mesh(make_mesh(topology, setup.sizes)):
        program = training(setup) if setup.program == "train" else inference(setup)
        held = {kind: bytes_on_a_device(tree) for kind, tree in program.held.items()}
        count = math.prod(setup.sizes.values()) // chip.devices
        told = {"mesh": setup.sizes, "chips": count, "tokens": program.tokens, "bytes": held, "memory": chip.memory}
        try:
            compiled, text = hlo.compiled(program.lowered)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return told | tpu_report.refusal(str(error))
    told["compile_seconds"] = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held["activations and temporaries"] = memory.temp_size_in_bytes + new
    held["program"] = memory.generated_code_size_in_bytes
    parts, unknown = parts_of(setup, text)
    assumed = "" if setup.program == "train" else ASSUMED
    told |= {"fits": True, "assumed": assumed, "unknown_loops": unknown}
    return told | tpu_report.of_parts(parts, chip)


def setup_of(values: flags.FlagValues) -> Setup:
    """The setup that the flags ask for; nothing is compiled.

    Raises:
      ValueError: where its parts do not fit together.
    """
    config = conversion.from_config_dict(TrainConfig, values.config)
    model = config.model if config.model and not values.model else None
    model = model or model_shapes.of(values.model or config.backbone, config.dtype)
    mesh = MeshConfig.parse(values.mesh) if values.mesh else config.mesh
    devices = len(chips.devices_of(values.topology))
    kept = CacheConfig(budget=values.budget, recent=values.recent, prefill_chunk=values.prefill_chunk)
    setup = Setup(values.program, config, model, mesh.over(devices), kept)
    setup = suggestions.with_data(setup, batch_size=values.batch, length=values.length)
    if setup.program == "train":
        setup.config.check_mesh(setup.sizes, model)
    return setup


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    jax.config.update("jax_enable_compilation_cache", False)  # a program for an absent device cannot be read back
    if values.output and not pathlib.Path(values.output).parent.is_dir():  # before the work
        raise ValueError(f"--output must be a file in a folder that is there, got {values.output!r}")
    setup, topology = setup_of(values), values.topology
    reports = [report(setup, topology)]
    tpu_report.show(reports[0], values.price_per_chip_hour)
    if values.suggest:
        for told in suggestions.search(setup, reports[0], lambda changed: report(changed, topology)):
            print(f"with {told['change']}:", flush=True)
            tpu_report.show(told, values.price_per_chip_hour)
            reports.append(told)
        print(suggestions.advice(reports), flush=True)
    if values.output:
        with open(values.output, "w") as file:
            json.dump(reports, file, indent=2)


if __name__ == "__main__":
    command.run(main, define_flags)

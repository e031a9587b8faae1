"""Compiles the programs of a config for TPUs that are not there, and says what they would take.

    python launch/compile_for_tpu.py --config=configs/qwen3_4b_long.py --topology=v5p:2x2x4 --mesh=fsdp:4,context:4
    python launch/compile_for_tpu.py --config=configs/qwen3_4b_long.py --topology=v5e:4x4 --mesh=fsdp:16 \\
        --length=32768 --batch=16 --price_per_chip_hour=1.2
    python launch/compile_for_tpu.py --config=configs/qwen3_math.py:14b --topology=v6e:2x4 --mesh=tensor:8 \\
        --program=decode --batch=64 --budget=1024

Needs the libtpu wheel and no TPU, network or weights: the true program is lowered from shapes, with the TPU kernels,
for every chip of the topology, and the compiler says whether it fits. Programs: `train`, a step; `prefill`, a chunk of
a prompt with its eviction; `decode`, a token of every sequence; `evict`, what follows --recent such tokens. Prints
bytes a chip by kind, FLOPs, bytes of HBM, collectives, and the time that the slowest of the three takes at the chip's
published peaks: a floor that no run will reach. If a training step does not fit, tries single changes and says which
of them does.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

# Before jax is imported: no TPU is looked for, and several compilers may run at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"RETENTION_JAX_KERNELS": "tpu"}

import chips
import hlo
import jax
import jax.numpy as jnp
import model_shapes
from absl import app, flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding

from retention_jax import cache, config_io, decoding, sharding, train
from retention_jax.config import CacheConfig, MeshConfig, TrainConfig
from retention_jax.model_config import ModelConfig
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam

# --config is a flag of `retention_jax.train`.
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips: v5e:4x4, v5p:2x2x4, v6e:2x4, tpu7x:2x2x1, ...")
_MESH = flags.DEFINE_string("mesh", "", "In place of config.mesh: data:2,fsdp:2,context:4; axes not named are 1.")
_MODEL = flags.DEFINE_string("model", "", "In place of config.backbone: a name in model_shapes.py, or a folder.")
_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "prefill", "decode", "evict"], "What to compile.")
_BUDGET = flags.DEFINE_integer("budget", 1024, "Kept entries per layer and head, where not training.")
_RECENT = flags.DEFINE_integer("recent", 128, "Tokens between two evictions.")
_CHUNK = flags.DEFINE_integer("prefill_chunk", 1024, "Tokens of a prompt that are read at a time.")
_BATCH = flags.DEFINE_integer("batch", None, "In place of config.data.batch_size; sequences, where not training.")
_LENGTH = flags.DEFINE_integer("length", None, "In place of config.data.length.")
_PRICE = flags.DEFINE_float("price_per_chip_hour", None, "For the cost of a million tokens.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Try single changes where it does not fit.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write; empty writes none.")


class Setup(NamedTuple):
    """One program of one size on one mesh."""

    config: TrainConfig
    model: ModelConfig
    sizes: dict[str, int]  # of the mesh's axes


class Program(NamedTuple):
    lowered: jax.stages.Lowered
    held: dict[str, Any]  # shapes of what lies in memory between calls, by kind
    tokens: int  # that a call processes


def training(setup: Setup) -> Program:
    """The training step."""
    state, frozen, batch, _ = train.shapes_of_step(setup.config, setup.model)
    held = {"weights": frozen, "gates": state.params, "optimiser": state.opt_state, "batch": batch}
    data = setup.config.data
    return Program(train.lower_step(setup.config, setup.model), held, data.batch_size * data.length)


def inference(setup: Setup) -> Program:
    """A program over the buffer, its weights laid out so that no key or value travels."""
    mesh, batch = sharding.entered(), setup.config.data.batch_size
    place = lambda a, layout: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout)
    row = sharding.WINDOW
    of_rows = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=_layout(mesh, row))
    model = nnx.eval_shape(lambda: Decoder(setup.model, setup.config.gate, rngs=nnx.Rngs(0)))
    if mesh is not None:
        model = jax.tree.map(place, model, sharding.of_tree(mesh, model, sharding.DECODING))
    config = CacheConfig(budget=_BUDGET.value, recent=_RECENT.value, prefill_chunk=_CHUNK.value)
    buffer = jax.eval_shape(lambda: cache.empty(setup.model, config, batch))
    put = lambda spec, part: jax.tree.map(lambda a: place(a, _layout(mesh, spec)), part)
    buffer = jax.tree.map(put, cache.layout(buffer), buffer, is_leaf=lambda x: isinstance(x, sharding.P))
    _, gates, weights = nnx.split(model, GateParam, ...)
    held = {"weights": weights, "gates": gates, "buffer": buffer}
    if _PROGRAM.value == "evict":
        lowered = jax.jit(cache.evict_full, donate_argnums=0).lower(buffer)
        return Program(lowered, {"buffer": buffer}, batch * _RECENT.value)
    if _PROGRAM.value == "decode":
        step = jax.jit(decoding.decode_step, donate_argnames="buffer")
        lowered = step.lower(model, of_rows(jnp.int32, batch), of_rows(jnp.bool_, batch), buffer=buffer)
        return Program(lowered, held, batch)
    chunk = (batch, _CHUNK.value)
    read = jax.jit(decoding.read_chunk, donate_argnames="buffer")
    lowered = read.lower(model, of_rows(jnp.int32, *chunk), of_rows(jnp.bool_, *chunk), buffer=buffer)
    return Program(lowered, held, math.prod(chunk))


def _layout(mesh: jax.sharding.Mesh | None, spec: sharding.P) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, sharding.present(mesh, spec))


def make_mesh(topology: str, sizes: dict[str, int]) -> jax.sharding.Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(devices, **sizes)


def bytes_on_a_chip(tree: Any) -> int:
    part = lambda s: math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
    return sum(map(part, jax.tree.leaves(tree)))


def report(setup: Setup, topology: str) -> dict[str, Any]:
    """Compiles; everything there is to say. `fits` is False where the compiler refuses for lack of memory."""
    started = time.perf_counter()
    with jax.set_mesh(make_mesh(topology, setup.sizes)):
        program = training(setup) if _PROGRAM.value == "train" else inference(setup)
        held = {kind: bytes_on_a_chip(tree) for kind, tree in program.held.items()}
        told: dict[str, Any] = {"mesh": setup.sizes, "tokens": program.tokens, "bytes": held}
        try:
            compiled, text = hlo.compiled(program.lowered)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            wanted = re.search(r"Used \S+ of \S+ hbm", str(error))
            return told | {"fits": False, "why": wanted[0] if wanted else str(error).splitlines()[0]}
    told["compile_seconds"] = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held["activations and temporaries"] = memory.temp_size_in_bytes + new
    held["program"] = memory.generated_code_size_in_bytes
    cost, chip = hlo.cost(text), chips.of_topology(topology)
    sent = sum(c.sent for c in cost.collectives)
    seconds = {"compute": cost.flops / chip.flops, "HBM": cost.bytes / chip.bandwidth, "ICI": sent / chip.ici}
    return told | {
        "fits": True,
        "memory": chip.memory,
        "flops": cost.flops,
        "hbm_bytes": cost.bytes,
        "sent_bytes": sent,
        "collectives": [c._asdict() for c in cost.collectives],
        "unknown_loops": cost.unknown_loops,
        "seconds": seconds,
    }


def show(told: dict[str, Any], price: float | None) -> None:
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    devices = math.prod(told["mesh"].values())
    print(", ".join(f"{axis} {n}" for axis, n in told["mesh"].items()), f"({devices} devices)")
    for kind, n in told["bytes"].items():
        print(f"  {kind:<28} {gib(n):>12}")
    if not told["fits"]:
        print(f"  DOES NOT FIT: {told['why']}", flush=True)
        return
    print(f"  {'all, of ' + gib(told['memory']):<28} {gib(sum(told['bytes'].values())):>12}   fits")
    print(f"  FLOPs a chip                 {told['flops'] / 1e12:>12,.1f} T")
    print(f"  HBM traffic a chip           {told['hbm_bytes'] / 1e9:>12,.1f} GB")
    for c in told["collectives"]:
        many = f"{c['count']:,.0f} x {c['kind']} over {c['devices']}"
        print(f"  {many:<28} {c['sent'] / 1e9:>12,.3f} GB sent by a chip")
    if told["unknown_loops"]:
        print(f"  {told['unknown_loops']} loops whose length depends on data are counted once")
    seconds = told["seconds"]
    slowest = max(seconds, key=lambda name: seconds[name])
    step, tokens = seconds[slowest], told["tokens"]
    times = ", ".join(f"{name} {s:.4g} s" for name, s in seconds.items())
    print(f"  at the chip's peaks: {times}: at least {step:.4g} s a step, bound by {slowest}")
    speed = f"  at most {tokens / step:,.0f} tokens/s, {tokens / step / devices:,.0f} a chip"
    if price is not None:
        speed += f"; at least ${price * devices * step / 3600 / tokens * 1e6:.4f} a million tokens"
    print(f"{speed}; compiled in {told['compile_seconds']:.0f} s", flush=True)


def changed(setup: Setup, **data_or_other: Any) -> Setup:
    in_data = {k: v for k, v in data_or_other.items() if k in ("batch_size", "length") and v is not None}
    other = {k: v for k, v in data_or_other.items() if k not in ("batch_size", "length")}
    data = dataclasses.replace(setup.config.data, **in_data)
    return setup._replace(config=dataclasses.replace(setup.config, data=data, **other))


def single_changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """What might make a training step fit, those first that cost least."""
    config, sizes = setup.config, setup.sizes
    if not config.remat:
        yield "remat=True", changed(setup, remat=True)
    block = config.loss.vocab_block
    if block > 512:
        loss = dataclasses.replace(config.loss, vocab_block=512)
        yield "loss.vocab_block=512", changed(setup, loss=loss)
    if sizes["data"] > 1:
        moved = sizes | {"data": 1, "fsdp": sizes["data"] * sizes["fsdp"]}
        yield f"fsdp {moved['fsdp']} in place of data {sizes['data']}", setup._replace(sizes=moved)
    rows = sizes["data"] * sizes["fsdp"]
    if config.data.batch_size % (2 * rows * config.optimizer.accumulation) == 0:
        optimizer = dataclasses.replace(config.optimizer, accumulation=2 * config.optimizer.accumulation)
        yield f"optimizer.accumulation={optimizer.accumulation}", changed(setup, optimizer=optimizer)
    for axis in ("data", "fsdp"):
        if sizes[axis] % 2 == 0:
            moved = sizes | {axis: sizes[axis] // 2, "context": 2 * sizes["context"]}
            text = f"context {moved['context']} and half the batch"
            yield text, changed(setup._replace(sizes=moved), batch_size=max(config.data.batch_size // 2, 1))
            break
    if config.data.batch_size % (2 * rows) == 0:
        half = config.data.batch_size // 2
        yield f"batch {half}", changed(setup, batch_size=half)


def asked() -> Setup:
    """The setup of the flags; raises ValueError, before anything is compiled, where its parts do not fit together."""
    config = config_io.from_config_dict(TrainConfig, flags.FLAGS.config)
    model = config.model if config.model and not _MODEL.value else None
    model = model or model_shapes.of(_MODEL.value or config.backbone, config.dtype)
    mesh = config.mesh
    if _MESH.value:
        pairs = [part.partition(":") for part in _MESH.value.split(",")]
        if bad := [axis for axis, _, n in pairs if axis not in sharding.AXES or not re.fullmatch(r"-?\d+", n)]:
            raise ValueError(f"--mesh must be as in data:2,fsdp:4 with axes {', '.join(sharding.AXES)}; got {bad[0]!r}")
        mesh = MeshConfig(**{axis: 1 for axis in sharding.AXES} | {axis: int(n) for axis, _, n in pairs})
    devices = len(topologies.get_topology_desc(platform="tpu", topology_name=str(_TOPOLOGY.value)).devices)
    setup = changed(Setup(config, model, mesh.over(devices)), batch_size=_BATCH.value, length=_LENGTH.value)
    if _PROGRAM.value == "train":
        setup.config.check_mesh(setup.sizes, model)
    return setup


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    setup, topology = asked(), str(_TOPOLOGY.value)
    reports = [report(setup, topology)]
    show(reports[-1], _PRICE.value)
    if _SUGGEST.value and _PROGRAM.value == "train" and not reports[-1]["fits"]:
        for text, candidate in single_changes(setup):
            try:
                candidate.config.check_mesh(candidate.sizes, candidate.model)
            except ValueError:
                continue  # a change that its own sizes rule out
            print(f"with {text}:", flush=True)
            reports.append({"change": text} | report(candidate, topology))
            show(reports[-1], _PRICE.value)
            if reports[-1]["fits"]:
                break
    if _OUTPUT.value:
        with open(_OUTPUT.value, "w") as file:
            json.dump(reports, file, indent=2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)

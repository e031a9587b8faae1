"""What the compiled decoding programs write; as a script, for a TPU that is not there, with its kernels: JSON lines.

    python tests/decode_program.py v5e:2x2

Needs the libtpu wheel and no TPU.
"""

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterator

if __name__ == "__main__":  # before jax is imported: no TPU is looked for, and several compilers may run at once
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("RETENTION_JAX_KERNELS", "tpu")

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retention_jax import cache
from retention_jax.config import CacheConfig, GateConfig, ModelConfig
from retention_jax.generation import decoding, runs
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs

# Instructions whose result is no new array, or is written by the computations they call.
NOT_WRITING = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\(")
ARRAY = re.compile(r"\w+\[(?P<sizes>[\d,]*)\](?P<layout>\{[^}]*\})?")
CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation)=%([^\s,]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def large_writes(
    compiled: jax.stages.Compiled, elements: int, *, evictions: bool = False, inside: str = ""
) -> list[str]:
    """Instructions of a compiled program that write an array of so many elements or more to memory, but for
    evictions (loops under the name `evict`) unless asked for. Arrays in a TPU's vector memory, S(1), do not count, nor
    what is not `inside` a loop under that name."""
    text = compiled.as_text()
    assert text is not None
    computations, name, entry = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            name = head[2]
            computations[name], entry = [], name if head[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            computations[name].append((found, line))

    def is_inside(found: re.Match[str], line: str) -> bool:
        return found["opcode"] == "while" and f"/{inside}/" in line

    def visit(name: str, seen: set[str], counts: bool) -> Iterator[str]:
        if name in seen:
            return
        seen.add(name)
        for found, line in computations[name]:
            arrays = list(ARRAY.finditer(found["type"]))
            if found["opcode"].endswith("-start"):
                arrays = arrays[:1]  # what is written; the others are its source and a semaphore
            sizes = [
                int(np.prod([int(n) for n in array["sizes"].split(",") if n]))
                for array in arrays
                if "S(1)" not in (array["layout"] or "")
            ]
            if counts and found["opcode"] not in NOT_WRITING and max(sizes, default=0) >= elements:
                yield f"{found['opcode']} {found['name']} {found['type']}"
            if found["opcode"] == "while" and "/evict/" in line and not evictions:
                continue
            if found["opcode"] in ("while", "conditional", "call"):
                branches = [b.strip(" %") for group in BRANCHES.findall(line) for b in group.split(",")]
                for called in CALLED.findall(line) + branches:
                    yield from visit(called, seen, counts or is_inside(found, line))

    assert entry and (not inside or any(is_inside(*x) for lines in computations.values() for x in lines))
    return list(visit(entry, set(), not inside))


def arguments(model: ModelConfig, budget: int, batch: int, recent: int = 16) -> tuple:
    """Shapes of a model, a token and a mark for each row, and a buffer."""
    gate = GateConfig(width=16, offset_init=1.0)
    return (
        nnx.eval_shape(lambda: Decoder(model, gate, rngs=nnx.Rngs(0))),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch,), bool),
        cache.shapes(model, CacheConfig(budget=budget, recent=recent), batch),
    )


def lower_step(model, token, active, buffer, *, place=lambda tree: tree) -> jax.stages.Lowered:
    """One token without eviction; `place` puts shapes on a device."""
    step = jax.jit(decoding.decode_step, donate_argnames="buffer")
    return step.lower(*place((model, token, active, buffer)))


def lower_run(model, token, active, buffer, *, place=lambda tree: tree) -> jax.stages.Lowered:
    """The loop of many tokens and their evictions."""
    model, _, _, buffer = place((model, token, active, buffer))
    return runs.lower_run(model, buffer, 32)


def lower_chunk(model, inputs, buffer, *, place=lambda tree: tree) -> jax.stages.Lowered:
    """A chunk of a prompt, not yet taken in."""
    return jax.jit(functools.partial(decoder.extend, queries=0)).lower(*place((model, inputs, buffer)))


def main(topology: str) -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
    sizes: dict[str, Any] = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_size=128, dtype="bfloat16")
    model = ModelConfig(vocab_size=64, width=64, mlp_width=128, **sizes)
    sliding = dataclasses.replace(model, sliding_window=300, sliding_layers=(1,))

    def report(name: str, lowered: jax.stages.Lowered, buffer: cache.Buffer, **how: Any) -> None:
        compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None and text is not None
        kernels = sorted(set(re.findall(r"%([a-z_]+)[.\d]* = [^\n]* custom-call\(", text)))
        line: dict[str, Any] = dict(
            program=name, writes=large_writes(compiled, buffer.pool.pos.size, **how), kernels=kernels
        )
        window = ",".join(map(str, buffer.recent.k.shape))
        line |= dict(windows_on_chip=len(re.findall(rf"bf16\[{window}\]{{[^}}]*S\(1\)}}", text)))
        line |= dict(temporaries=memory.temp_size_in_bytes, pool_bytes=2 * buffer.pool.k.size * 2)
        print(json.dumps(line), flush=True)

    # More than fits in vector memory, as real pools and windows are; a layer's windows are larger than the positions.
    with jax.set_mesh(mesh):
        for name, config in (("step", model), ("sliding step", sliding)):
            args = arguments(config, budget=2**17, batch=2, recent=2**16)
            report(name, lower_step(*args, place=place), args[3])
        # Windows that fit in vector memory, of which each layer reads its own, and weights that take their time.
        roomy = dataclasses.replace(model, width=2048, mlp_width=8192, num_layers=16)
        args = arguments(roomy, budget=2**12, batch=4, recent=2**8)
        report("step with room", lower_step(*args, place=place), args[3])
        args = arguments(model, budget=2**17, batch=2)
        # Not what the compiler does for evictions before their loop.
        report("run", lower_run(*args, place=place), args[3], inside="tokens")
        chunk: Any = Inputs(*(jax.ShapeDtypeStruct((2, 256), dtype) for dtype in (jnp.int32, jnp.bool_)))  # pyright: ignore
        report("chunk", lower_chunk(args[0], chunk, args[3], place=place), args[3])


if __name__ == "__main__":
    main(sys.argv[1])

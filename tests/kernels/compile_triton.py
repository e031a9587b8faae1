"""Compiles the Triton kernels for GPUs that are not there; prints registers, spills and shared memory as JSON lines.

    python tests/kernels/compile_triton.py 80 90

Needs Triton and no GPU. The launches are those that the operations make at the sizes of published models, recorded
while the operations are traced; the arguments are compute capabilities.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from retention_jax.kernels import triton_call
from retention_jax.kernels.buffer_attention_triton import buffer_attention
from retention_jax.kernels.buffer_attention_xla import Window
from retention_jax.kernels.evict_pack_triton import pack_rows
from retention_jax.kernels.evict_xla import Order
from retention_jax.kernels.retention_attention_triton import retention_attention
from retention_jax.kernels.retention_mass_triton import retention_mass

TYPES = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "int16": "*i16", "uint16": "*u16", "uint32": "*u32"}


def shaped(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def decode(T: int, N: int, K: int, H: int, dtype=jnp.bfloat16, windowed: bool = False):
    """Attention of T tokens over a buffer of 36 layers, 1024 entries a head."""
    B, S, R, i32 = 1, 36 * K * 1024, 128, jnp.int32
    held: dict[str, Any] = dict(
        pool_k=shaped(dtype, B, S, H),
        pool_v=shaped(dtype, B, S, H),
        offset=shaped(i32, B, K + 1),
        recent_k=shaped(dtype, B, 36, K, R, H),
        recent_v=shaped(dtype, B, 36, K, R, H),
        recent_range=shaped(i32, B, 2),
        layer=shaped(i32),
    )
    # Shapes in the place of arrays.
    window = Window._make(shaped(i32, *axes) for axes in ((), (B,), (B,), (B, S))) if windowed else None
    return lambda: jax.eval_shape(buffer_attention, shaped(dtype, B, T, N, H), window=window, **held)


def attention(T: int, N: int, K: int, H: int, dtype=jnp.bfloat16):
    def loss(q, k, v, log_beta, segment_ids, window):
        return retention_attention(q, k, v, log_beta, segment_ids, window).astype(jnp.float32).sum()

    tensors = [shaped(dtype, 1, T, heads, H) for heads in (N, K, K)]
    rest = shaped(jnp.float32, 1, K, T), shaped(jnp.int32, 1, T), shaped(jnp.int32)
    return lambda: jax.eval_shape(jax.grad(loss, (0, 1, 2, 3)), *tensors, *rest)


def mass(T: int, heads: int):
    loss = lambda log_beta, segment_ids: retention_mass(log_beta, segment_ids).sum()
    return lambda: jax.eval_shape(jax.grad(loss), shaped(jnp.float32, 1, heads, T), shaped(jnp.int32, 1, T))


def pack(slots: int, entries: int, *H: int):
    order = Order._make(shaped(jnp.int32, 1, n) for n in (slots, 16))  # shapes in the place of arrays
    arrays = shaped(jnp.bfloat16, 1, slots, *H), shaped(jnp.bfloat16, 1, entries, *H)
    return lambda: jax.eval_shape(pack_rows, *arrays, order)


PROGRAMS = {
    "train Qwen3": attention(131072, 32, 8, 128),
    "train Phi-3": attention(131072, 32, 32, 96),
    "train heads of 256": attention(4096, 8, 2, 256),
    "train in float32": attention(4096, 8, 2, 128, jnp.float32),
    "mass Qwen3": mass(131072, 36 * 8),
    "pack rows": pack(36 * 8 * 1024, 36 * 8 * 128, 128),
    "pack numbers": pack(36 * 8 * 1024, 36 * 8 * 128),
    "decode Qwen3": decode(1, 32, 8, 128),
    "chunk Qwen3": decode(1024, 32, 8, 128),
    "decode Phi-3": decode(1, 32, 32, 96, windowed=True),
    "chunk of 256 in float32": decode(64, 8, 1, 256, jnp.float32),
}


def recorded(program) -> list[tuple[triton_call.Launch, list[str]]]:
    """The launches of a program, each with the types of its arrays."""
    launches = []

    def record(launch, *arrays):
        launches.append((launch, [TYPES[str(a.dtype)] for a in (*arrays, *launch.outputs)]))
        return tuple(jnp.zeros(o.shape, o.dtype) for o in launch.outputs)

    triton_call.run = record
    program()
    return launches


def compiled(launch: triton_call.Launch, types: list[str], capability: int) -> dict:
    kernel = launch.function()
    names = kernel.arg_names[: len(types)]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(launch.constants, "constexpr")
    # As jax-triton has it: every array begins at a multiple of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True)
    target = GPUTarget("cuda", capability, 32)
    program = triton.compile(ASTSource(kernel, signature, launch.constants, aligned), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return dict(registers=used["REG"], stack=used["STACK"], shared=program.metadata.shared)


if __name__ == "__main__":
    # Recorded once: JAX does not trace the same program a second time.
    launches = {name: recorded(program) for name, program in PROGRAMS.items()}
    for capability in map(int, sys.argv[1:]):
        for name, of_program in launches.items():
            for launch, types in of_program:
                report = dict(sm=capability, program=name, kernel=launch.kernel, warps=launch.num_warps)
                print(json.dumps(report | compiled(launch, types, capability)), flush=True)

"""Compiles the kernels for TPUs that are not there; prints each kernel's use of vector memory, as JSON lines.

    python tests/kernels/compile_tpu.py v5e:2x2 qwen3_4b

Needs the libtpu wheel and no TPU. v5p:2x2x1, v6e:2x2 and tpu7x:2x2x1 are other topologies it knows. Sizes are the
largest that configs use, of models with heads of every size. What the interpreter cannot run, the kernels under vmap,
jax.checkpoint and shard_map, is lowered for the TPU at a small size.
"""

import json
import os
import re
import sys
from functools import partial

# Before jax is imported: no TPU is looked for, and several compilers may run at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from tpu_models import CHUNK, MODELS, TOKENS, WINDOW, Model

from retention_jax.kernels import evict_pack_tpu, evict_select_tpu
from retention_jax.kernels.buffer_attention_tpu import buffer_attention
from retention_jax.kernels.buffer_attention_xla import Window
from retention_jax.kernels.retention_attention_tpu import retention_attention
from retention_jax.kernels.retention_mass_tpu import retention_mass

DECODE_BATCH, DECODE_BUDGET = 64, 1024
# In a serialized executable: the names of instructions that call a kernel, and, in the same order, what the compiler
# noted about these calls.
CALL = re.compile(rb"((?:retention|buffer|evict)_[a-z_]*[a-z])[_.\d]*\x12\x0bcustom-call")
VMEM = re.compile(
    rb'"custom_call_config":{"body":.*?"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"}\]',
    re.DOTALL,
)


def attention_step(q, k, v, log_beta, segment_ids, window):
    def loss(q, k, v, log_beta):
        return retention_attention(q, k, v, log_beta, segment_ids, window).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 3))(q, k, v, log_beta)


def mass_step(log_beta, segment_ids):
    return jax.value_and_grad(lambda x: retention_mass(x, segment_ids).sum())(log_beta)


def evict_step(score, pos, head, live, offset, pool, window, *, local):
    """Search and packing of one eviction."""
    groups = offset.shape[1] - 1 if local else 1
    capacity, shared = pool.shape[1] // groups, window.shape[1]
    keep = evict_select_tpu.select_top(score, pos, head, live, capacity=capacity, groups=groups, shared=shared)
    order, offset = evict_pack_tpu.pack_order(keep, head, offset, WINDOW)
    return evict_pack_tpu.pack_rows(pool, window, order), offset


def layers_step(q, k, v, log_beta, segment_ids, windows):
    """Gradients of checkpointed layers in a scan, under vmap."""

    def loss(q, log_beta):
        def layer(h, window):
            mass = retention_mass(log_beta, segment_ids)[:, :1].swapaxes(1, 2)[..., None].astype(h.dtype)
            return h + mass * retention_attention(h, k, v, log_beta, segment_ids, window), None

        return jax.lax.scan(jax.checkpoint(layer), q, windows)[0].astype(jnp.float32).sum()

    return jax.vmap(jax.grad(loss, (0, 1)))(q, log_beta)


def sharded_step(devices):
    """Lowers both operations under shard_map, sequences over one axis of four devices and heads over the other."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2, devices=devices)
    by_token, by_head = P("data", None, "tensor", None), P("data", "tensor", None)
    specs = (by_token, by_token, by_token, by_head, P("data", None))
    attention = jax.shard_map(retention_attention, in_specs=specs, out_specs=by_token)
    mass = jax.shard_map(retention_mass, in_specs=specs[3:], out_specs=by_head)

    def loss(q, k, v, log_beta, segment_ids):
        return (attention(q, k, v, log_beta, segment_ids) ** 2).sum() + mass(log_beta, segment_ids).sum()

    shapes = [(4, 300, 4, 64), (4, 300, 2, 64), (4, 300, 2, 64), (4, 2, 300), (4, 300)]
    dtypes = [jnp.float32] * 4 + [jnp.int32]
    with jax.set_mesh(mesh):
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
        ]
        jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args)


def compile_programs(topology: str, model: Model) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P())
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    f32, i32, bf16 = jnp.float32, jnp.int32, jnp.bfloat16
    T, N, K, H, all_heads = TOKENS, model.heads, model.kv_heads, model.head_size, model.layers * model.kv_heads
    tensors = shaped(bf16, 1, T, N, H), shaped(bf16, 1, T, K, H), shaped(bf16, 1, T, K, H), shaped(f32, 1, K, T)

    def reads(batch, tokens, slots):
        held = dict(
            pool_k=shaped(bf16, batch, slots, H),
            pool_v=shaped(bf16, batch, slots, H),
            offset=shaped(i32, batch, K + 1),
            recent_k=shaped(bf16, batch, model.layers, K, WINDOW, H),
            recent_v=shaped(bf16, batch, model.layers, K, WINDOW, H),
            recent_range=shaped(i32, batch, 2),
            layer=shaped(i32),
        )
        of_rows = shaped(i32, batch)
        window = Window(shaped(i32), of_rows, of_rows, shaped(i32, batch, slots)) if model.sliding else None
        read = lambda q, held, window: buffer_attention(q, **held, window=window)
        return read, (shaped(bf16, batch, tokens, N, H), held, window)

    slots, new = all_heads * model.budget, all_heads * WINDOW
    entries = [shaped(dtype, 1, slots + new) for dtype in (f32, i32, i32, jnp.bool_)]
    rows = shaped(bf16, 1, slots, H), shaped(bf16, 1, new, H)
    programs = {
        "train": (attention_step, (*tensors, shaped(i32, 1, T), shaped(i32))),
        "mass": (mass_step, (shaped(f32, 1, all_heads, T), shaped(i32, 1, T))),
        "decode": reads(DECODE_BATCH, 1, all_heads * DECODE_BUDGET),
        "chunk": reads(1, CHUNK, slots),
        "evict": (partial(evict_step, local=model.local), (*entries, shaped(i32, 1, all_heads + 1), *rows)),
    }
    for name, (program, args) in programs.items():
        with jax.set_mesh(mesh):
            compiled = jax.jit(program).lower(*args).compile()
        # Not from `as_text`: jaxlib refuses what some of these compilers write.
        executable = compiled.runtime_executable()
        assert executable is not None
        executable = executable.serialize()
        # A program is in it more than once.
        for kernel, vmem in dict.fromkeys(zip(CALL.findall(executable), VMEM.findall(executable), strict=True)):
            report = {"topology": topology, "program": name, "kernel": kernel.decode(), "vmem": int(vmem)}
            print(json.dumps(report), flush=True)
    tensors = shaped(bf16, 2, 1, 300, 4, 64), shaped(bf16, 1, 300, 2, 64), shaped(bf16, 1, 300, 2, 64)
    with jax.set_mesh(mesh):
        jax.jit(layers_step).lower(*tensors, shaped(f32, 2, 1, 2, 300), shaped(i32, 1, 300), shaped(i32, 3))
    sharded_step(devices[:4])


if __name__ == "__main__":
    compile_programs(sys.argv[1], MODELS[sys.argv[2]])

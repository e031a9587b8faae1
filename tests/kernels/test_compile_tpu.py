"""The real TPU compiler accepts the kernels at the largest sizes, in the vector memory the formulas say."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from helpers import environment_for_tpu_compiler

from retention_jax.kernels import blocks

pytest.importorskip("libtpu")
SCRIPT = pathlib.Path(__file__).parent / "compile_tpu.py"
ATTENTION = ("forward", "dq", "dkv")
GROUPS = {"qwen3": 4, "phi3": 1}  # heads of 128 and of 96, which are padded to 128
LENGTH = 131072


@pytest.mark.parametrize(
    "topology, program", [("v5e:2x2", "qwen3"), ("v5p:2x2x1", "phi3"), ("v6e:2x2", "qwen3"), ("tpu7x:2x2x1", "phi3")]
)
def test_kernels_compile(topology, program):
    # A process of its own: the compiler is told not to look for a TPU before jax is imported.
    command = [sys.executable, SCRIPT, topology, program, "mass", "decode", "chunk", "evict"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment_for_tpu_compiler())
    assert run.returncode == 0, run.stderr[-4000:]
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    vmem = {(r["program"], r["kernel"]): r["vmem"] for r in reports}
    print(topology, vmem)

    chosen = blocks.attention_blocks(LENGTH, GROUPS[program], 128, jnp.bfloat16)
    formula = blocks.attention_vmem_bytes(chosen, GROUPS[program], 128, jnp.bfloat16)
    used = [vmem.pop((program, f"retention_attention_{kernel}")) for kernel in ATTENTION]
    assert formula / 2 < max(used) <= formula, used
    used = [vmem.pop(("mass", f"retention_mass_{kernel}")) for kernel in ("forward", "backward")]
    assert max(used) <= blocks.mass_vmem_bytes(LENGTH)
    for name, tokens, groups in (("decode", 1, 5), ("chunk", 1024, 4)):
        chosen = blocks.buffer_blocks(tokens, 36 * 8 * 4096, 128, 8, groups, 128, jnp.bfloat16)
        assert vmem.pop((name, "buffer_attention")) <= blocks.buffer_vmem_bytes(chosen, 8, groups, 128, jnp.bfloat16)
    # Keys and result of a search are arrays of the program, which the compiler keeps on the chip where it can.
    assert vmem.pop(("evict", "evict_select")) <= blocks.select_vmem_bytes(36 * 8 * (4096 + 128))
    assert 0 < vmem.pop(("evict", "evict_pack")) <= blocks.VMEM_BUDGET
    assert vmem == {}

"""The real TPU compiler accepts the kernels at the largest sizes, in the vector memory the formulas say."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from helpers import environment_for_tpu_compiler
from tpu_models import CHUNK, MODELS, TOKENS, WINDOW

from retention_jax.kernels import blocks

pytestmark = pytest.mark.slow  # compiles every Pallas kernel for four TPUs

pytest.importorskip("libtpu")
SCRIPT = pathlib.Path(__file__).parent / "compile_tpu.py"
ATTENTION = ("forward", "dq", "dkv")


# Between them every kernel on every topology, heads of every size, sliding windows, and a search in each head.
@pytest.mark.parametrize(
    "topology, name",
    [
        ("v6e:2x2", "qwen3_14b"),
        pytest.param("v5e:2x2", "llama_1b", marks=pytest.mark.one_version),
        pytest.param("v5p:2x2x1", "phi3_mini", marks=pytest.mark.one_version),
        pytest.param("tpu7x:2x2x1", "gemma2_9b", marks=pytest.mark.one_version),
    ],
)
def test_kernels_compile(topology, name):
    # A process of its own: the compiler is told not to look for a TPU before jax is imported.
    run = subprocess.run(
        [sys.executable, SCRIPT, topology, name], capture_output=True, text=True, env=environment_for_tpu_compiler()
    )
    assert run.returncode == 0, run.stderr[-4000:]
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    vmem = {(r["program"], r["kernel"]): r["vmem"] for r in reports}
    print(topology, name, vmem)

    model, bf16 = MODELS[name], jnp.bfloat16
    groups, K, H, heads = model.heads // model.kv_heads, model.kv_heads, model.head_size, model.layers * model.kv_heads
    chosen = blocks.attention_blocks(TOKENS, groups, H, bf16)
    formula = blocks.attention_vmem_bytes(chosen, groups, H, bf16)
    used = [vmem.pop(("train", f"retention_attention_{kernel}")) for kernel in ATTENTION]
    assert formula / 2 < max(used) <= formula, used
    used = [vmem.pop(("mass", f"retention_mass_{kernel}")) for kernel in ("forward", "backward")]
    assert max(used) <= blocks.mass_vmem_bytes(TOKENS)
    for program, tokens in (("decode", 1), ("chunk", CHUNK)):
        chosen = blocks.buffer_blocks(tokens, heads * model.budget, WINDOW, K, groups, H, bf16)
        assert vmem.pop((program, "buffer_attention")) <= blocks.buffer_vmem_bytes(chosen, K, groups, H, bf16)
    # Keys and result of a search are arrays of the program, which the compiler keeps on the chip where it can.
    assert vmem.pop(("evict", "evict_select")) <= blocks.select_vmem_bytes(heads * (model.budget + WINDOW))
    assert 0 < vmem.pop(("evict", "evict_pack")) <= blocks.VMEM_BUDGET
    assert vmem == {}

"""Kernels run in strict modes: no dtype promotion; TPU kernels in an interpreter that knows the chip's memories, Triton
kernels in one between guards. On an accelerator nothing is interpreted."""

import os

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from retention_jax.kernels import triton_call

ON_DEVICE = os.environ.get("RETENTION_JAX_TEST_DEVICE") == "1"
if not ON_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


@pytest.fixture(autouse=True)
def strict(capsys, monkeypatch):
    """Reads out of bounds raise, memory starts as nan, and two unordered accesses to one place fail the test."""
    if ON_DEVICE:
        with jax.numpy_dtype_promotion("strict"):
            yield
        return
    import interpret_triton  # needs PyTorch, which an accelerator's machine may lack

    params = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan", detect_races=True)
    monkeypatch.setattr(triton_call, "run", interpret_triton.run)
    with jax.numpy_dtype_promotion("strict"), pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" not in capsys.readouterr().out

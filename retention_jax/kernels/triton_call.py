"""How a Triton kernel is called from JAX: the launch as data, and the one place that knows jax-triton.

Triton and jax-triton are optional and are imported when a kernel is called. A launch names its kernel, so that modules
which describe launches import without Triton, and so that what a GPU runs is what tests run in Triton's interpreter and
compile for a GPU that is not there: same grid, same constants.
"""

import functools
import importlib
import inspect
from typing import Any, NamedTuple

import jax
from jaxtyping import Array


class Launch(NamedTuple):
    """One call of a kernel, whose parameters are the arrays, then the outputs, then the constants by name."""

    kernel: str  # "module.function" in this package
    grid: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def function(self) -> Any:
        module, name = self.kernel.split(".")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def check_available() -> None:
    """Raises ValueError if Triton kernels cannot run in this process."""
    if (backend := jax.default_backend()) != "gpu":
        raise ValueError(f"Triton kernels need a GPU, the backend of this process is {backend}")
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        raise ValueError(f"Triton kernels need jax-triton: pip install 'retention_jax[gpu]' ({error})") from error


def call(launch: Launch, *arrays: Array) -> tuple[Array, ...]:
    """Runs a kernel; under vmap one element after the other, under grad not at all (use jax.custom_vjp)."""
    return jax.custom_batching.sequential_vmap(functools.partial(run, launch))(*arrays)


def run(launch: Launch, *arrays: Array) -> tuple[Array, ...]:
    """The one call of jax-triton."""
    triton_call = importlib.import_module("jax_triton").triton_call
    # jax-triton 0.4 calls it out_type, 0.3 out_shape.
    outputs = "out_type" if "out_type" in inspect.signature(triton_call).parameters else "out_shape"
    results = triton_call(
        *arrays,
        kernel=launch.function(),
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **{outputs: launch.outputs},
        **launch.constants,
    )
    return tuple(results)


def padded_head(size: int) -> int:
    """Triton's tiles are powers of 2, and a matrix product takes at least 16."""
    return max(16, 1 << (size - 1).bit_length())

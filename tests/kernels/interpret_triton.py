"""Runs launches of Triton kernels in Triton's interpreter, from JAX: what a GPU would run, grid and constants included.

Outputs start as nan. Every array lies between guards, nan or the smallest integer: a read beyond an array spoils the
result, a write is noticed. TRITON_INTERPRET must be set before Triton is imported, as conftest.py does.
"""

import functools
import math

import jax
import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

GUARD = 64  # elements


def _float32(x):
    """Triton holds bfloat16 as bit patterns."""
    if x.dtype.scalar != tl.bfloat16:
        return x.data
    return x.data.view(ml_dtypes.bfloat16).astype(np.float32)


def _exact_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 numbers; a tensor core multiplies the numbers
    exactly and adds in float32."""
    return interpreter.TensorHandle(np.matmul(_float32(a), _float32(b)) + d.data, d.dtype.scalar)


def _rounding_cast(self, src, dst_type):
    """Triton 3.9's interpreter cuts float32 to bfloat16; a GPU rounds to nearest, ties to even."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    return self.cast_impl(src, dst_type)


interpreter.InterpreterBuilder.create_dot = _exact_dot
interpreter.InterpreterBuilder.create_fp_trunc = _rounding_cast


def _guarded(size: int, dtype: np.dtype) -> np.ndarray:
    poison = np.nan if dtype.kind not in "iu" else np.iinfo(dtype).min
    return np.full(size + 2 * GUARD, poison, dtype)


def _tensor(guarded: np.ndarray) -> torch.Tensor:
    """The array between the guards, in the same memory."""
    if guarded.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(guarded.view(np.int16)).view(torch.bfloat16)[GUARD:]
    return torch.from_numpy(guarded)[GUARD:]


def _on_host(launch, *arrays):
    sizes = [a.size for a in arrays] + [math.prod(o.shape) for o in launch.outputs]
    dtypes = [a.dtype for a in arrays] + [np.dtype(o.dtype) for o in launch.outputs]
    buffers = [_guarded(size, dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    for buffer, array in zip(buffers, arrays, strict=False):
        buffer[GUARD : GUARD + array.size] = np.asarray(array).ravel()
    with np.errstate(all="ignore"):  # as on a GPU
        launch.function()[launch.grid](*map(_tensor, buffers), **launch.constants)
    for buffer, size in zip(buffers, sizes, strict=True):
        guard = _guarded(0, buffer.dtype)[:GUARD].tobytes()
        assert buffer[:GUARD].tobytes() == buffer[GUARD + size :].tobytes() == guard, f"{launch.kernel} wrote outside"
    results = buffers[len(arrays) :]
    return tuple(
        b[GUARD : GUARD + math.prod(o.shape)].reshape(o.shape) for b, o in zip(results, launch.outputs, strict=True)
    )


def run(launch, *arrays):
    """In place of `triton_call.run`."""
    return jax.pure_callback(functools.partial(_on_host, launch), launch.outputs, *arrays)

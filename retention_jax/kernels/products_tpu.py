"""Matrix products inside TPU kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Product summed over one axis of each, in float32: exact products of bfloat16, all bits of float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def weighted(a: Array, b: Array) -> Array:
    """a @ b, one of which is float32 weights and the other has the inputs' dtype.

    Weights of bfloat16 inputs enter as two bfloat16 numbers, what rounding leaves and what it takes away. With the
    first alone, errors of `out` and dq are up to three times those of rounding the exact result to bfloat16; and an
    `out` made that way would give log_beta's float32 gradient, through delta = sum_h do out, an error of 2^-9.
    """
    if a.dtype == b.dtype:
        return dot(a, b, 1, 0)
    if a.dtype == jnp.float32:
        rounded = a.astype(b.dtype)
        return dot(rounded, b, 1, 0) + dot((a - rounded.astype(a.dtype)).astype(b.dtype), b, 1, 0)
    rounded = b.astype(a.dtype)
    return dot(a, rounded, 1, 0) + dot(a, (b - rounded.astype(b.dtype)).astype(a.dtype), 1, 0)

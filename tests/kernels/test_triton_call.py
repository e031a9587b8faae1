"""The one call of jax-triton, as each of its versions wants it."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from retention_jax.kernels.triton_call import Launch, run

pytest.importorskip("triton")
FLOAT = jax.ShapeDtypeStruct((4,), jnp.float32)
LAUNCH = Launch("evict_pack_triton_kernels.pack", (3, 2), (FLOAT, FLOAT), {"size": 8}, num_warps=2, num_stages=1)


def version_3(*args, kernel, out_shape, grid, name="", num_warps=None, num_stages=None, num_ctas=1, **metaparams):
    assert (kernel, grid, num_warps, num_stages, metaparams) == (LAUNCH.function(), (3, 2), 2, 1, {"size": 8})
    return [args[0] + i for i, _ in enumerate(out_shape)]


def version_4(*args, kernel, out_type=None, grid, name="", num_warps=None, num_stages=None, num_ctas=None, **kwargs):
    assert out_type is not None and "out_shape" not in kwargs
    return version_3(
        *args, kernel=kernel, out_shape=out_type, grid=grid, num_warps=num_warps, num_stages=num_stages, **kwargs
    )


@pytest.mark.parametrize("triton_call", [version_3, version_4])
def test_every_version_gets_the_launch(triton_call, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    first, second = run(LAUNCH, jnp.arange(4.0))
    assert first.tolist() == [0, 1, 2, 3] and second.tolist() == [1, 2, 3, 4]

"""Strict settings for every test: CPU with 8 fake devices, no rank promotion.

With RETENTION_JAX_TEST_DEVICE=1 the tests marked `device` run on the accelerator that JAX finds, and no others do.
"""

import os

import jax
import pytest

ON_DEVICE = os.environ.get("RETENTION_JAX_TEST_DEVICE") == "1"
if not ON_DEVICE:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"  # in commands that tests start
    jax.config.update("jax_platforms", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config, items):
    if ON_DEVICE:
        others = [item for item in items if item.get_closest_marker("device") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Every compiled program maps memory, and a process may hold some 65,000 maps: above that XLA dies in mmap."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compile_quickly():
    """Compiling takes most of the time of many tests; unoptimised programs take half of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

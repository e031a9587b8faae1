"""Strict settings for every test: CPU with 8 fake devices, no rank promotion."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # also in commands that tests start

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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

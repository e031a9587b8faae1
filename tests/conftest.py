"""Strict settings for every test: CPU with 8 fake devices, no rank promotion, unoptimised programs.

With RETENTION_JAX_TEST_DEVICE=1 the tests marked `device` run on the accelerator that JAX finds, and no others do.
"""

import os

import jax
import pytest

ON_DEVICE = os.environ.get("RETENTION_JAX_TEST_DEVICE") == "1"
if not ON_DEVICE:
    # Compiling is most of the time of most tests; without optimisations it takes a fifth. Commands that tests start
    # inherit this, all but those that compile for TPU, whose library dies of flags that only CPUs have.
    xla_flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    xla_flags += " --xla_llvm_disable_expensive_passes=true"
    if jax.__version_info__ < (0, 11):  # later ones have no such choice
        xla_flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}"
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

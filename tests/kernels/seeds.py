"""Where the random inputs of the kernels' tests begin: with RETENTION_JAX_TEST_SEED=7 all of them are others."""

import os

import numpy as np

SEED = int(os.environ.get("RETENTION_JAX_TEST_SEED", "0"))


def generator(case: int) -> np.random.Generator:
    return np.random.default_rng([SEED, case])

"""The public implementations' outputs on tiny vision-language models, in ../shared/golden_vl."""

import functools
import json
import pathlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden_vl"
needs_goldens = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden_vl")
MODELS = ("q3", "q25")
CASES = ("one", "two", "clip", "mixed", "turns", "text")


@functools.cache
def recorded(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return dict(arrays)


def texts(name: str) -> dict[str, dict[str, str]]:
    return json.loads((GOLDEN / f"{name}_texts.json").read_text())

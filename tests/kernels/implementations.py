"""An operation's implementations as parameters of its tests."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest


def params(kernels: Mapping[str, Callable[..., Any]]) -> list[Any]:
    """By name. Interpreted Triton takes long: the same cases run on the other two implementations."""
    return [pytest.param(op, id=name, marks=[pytest.mark.slow] * (name == "triton")) for name, op in kernels.items()]

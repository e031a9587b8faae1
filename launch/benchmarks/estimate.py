"""What the TPU compiler says of a program for a chip that is not there: operations, bytes, memory, from them a time.

The time is the larger of operations over the chip's peak and bytes over its bandwidth: a floor, not a simulation. What
a kernel costs is what its `pl.CostEstimate` says. Loops whose length depends on data are counted once, and told. A
program that sorts much gets no time: how many passes a bitonic network has is known, how many go through HBM is not.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import chips
import hlo
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .programs import Case, Row, memory_use
from .settings import Settings


class Peaks(NamedTuple):
    """Of one device."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # bytes


_SORT = re.compile(r"= \(?\w+\[([\d,]+)\].* (?:sort|topk)\(.*?(?:dimensions={(\d+)}|$)", re.MULTILINE)


def _sorts(text: str, negligible: float) -> list[str]:
    """What is known of each sort of a program: a bitonic network of 2^p numbers has p (p + 1) / 2 passes.

    Without those that would move fewer than `negligible` bytes if all passes of a value and an index went through HBM.
    """
    told = []
    for shape, axis in _SORT.findall(text):
        sizes = [*map(int, shape.split(","))]
        length = sizes[int(axis or -1)]
        p = (length - 1).bit_length()
        passes = p * (p + 1) // 2
        if passes * 2 * 8 * math.prod(sizes) > negligible:
            told.append(f"no time: a sort of {length:,}, {passes} passes of a bitonic network")
    return told


def _on(make: Callable[[], tuple], sharding: NamedSharding) -> tuple:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), jax.eval_shape(make))


def estimate(
    cases_of: Callable[[Settings], Iterable[Case]], settings: Settings, topology: str, peaks: Peaks
) -> Iterator[Row]:
    """A row for each case, compiled for one device of the topology."""
    devices = chips.devices_of(topology)
    mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    for case in cases_of(settings):
        try:
            with jax.set_mesh(mesh):  # kernels ask which chip they are for
                program = jax.jit(case.program, donate_argnums=(0,) if case.donates else ())
                compiled, text = hlo.compiled(program.lower(*_on(case.make, sharding)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield case.labels | {"note": "does not fit"}
            continue
        cost, memory = hlo.cost(text), memory_use(compiled)
        loops = [f"{cost.unknown_loops} loops counted once"] if cost.unknown_loops else []
        seconds = max(cost.flops / peaks.flops, cost.bytes / peaks.bandwidth)
        sorts = _sorts(text, peaks.bandwidth * seconds / 100)
        least = max(case.work.flops / peaks.flops, case.work.bytes / peaks.bandwidth)
        time: Row = {
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": case.tokens / seconds,
            "gigabytes": cost.bytes / 1e9,
            "gigaflops": cost.flops / 1e9,
            "bound": "matmul" if cost.flops / peaks.flops > cost.bytes / peaks.bandwidth else "memory",
            "of_roofline": least / seconds,
        }
        yield (
            case.labels
            | ({} if sorts else time)
            | {
                "temporary_bytes": memory.temporary,
                "of_memory": memory.total / peaks.memory,
                "note": ", ".join(loops + sorts),
            }
        )

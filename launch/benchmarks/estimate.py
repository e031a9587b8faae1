"""What the TPU compiler says of a program for a chip that is not there: operations, bytes, memory, from them a time.

The time is the larger of operations over the chip's peak and bytes over its bandwidth: a floor, not a simulation. What
a kernel costs is what its `pl.CostEstimate` says. Loops whose length depends on data, and sorts, are counted once, and
told.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import hlo
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .programs import Case, Row, memory_use
from .settings import Settings


class Peaks(NamedTuple):
    """Of one device."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # bytes


def _on(make: Callable[[], tuple], sharding: NamedSharding) -> tuple:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), jax.eval_shape(make))


def estimate(
    cases_of: Callable[[Settings], Iterable[Case]], settings: Settings, topology: str, peaks: Peaks
) -> Iterator[Row]:
    """A row for each case, compiled for one device of the topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
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
        once = {"loops": cost.unknown_loops, "sorts": len(re.findall(r" (?:sort|topk)\(", text))}
        seconds = max(cost.flops / peaks.flops, cost.bytes / peaks.bandwidth)
        least = max(case.work.flops / peaks.flops, case.work.bytes / peaks.bandwidth)
        yield case.labels | {
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": case.tokens / seconds,
            "gigabytes": cost.bytes / 1e9,
            "gigaflops": cost.flops / 1e9,
            "bound": "matmul" if cost.flops / peaks.flops > cost.bytes / peaks.bandwidth else "memory",
            "of_roofline": least / seconds,
            "temporary_bytes": memory.temporary,
            "of_memory": memory.total / peaks.memory,
            "note": ", ".join(f"{n} {what} counted once" for what, n in once.items() if n),
        }

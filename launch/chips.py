"""Published peaks of TPU chips, for one JAX device: what a time estimated by the compiler is divided by.

Google's pages https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, read 2026-11; v5e's bandwidth as in that
page's earlier table. `ici` is half of the pages' bidirectional bandwidth of a chip (400, 1200, 800 and 1200 GB/s) over
the axes of the torus, two of a v5e or v6e and three of the others: what a ring along one of them gets. A chip has one
or two TensorCores; JAX sees the two of a v5p as one device, those of a TPU7x as two devices with half of the chip each.
"""

from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """Peaks of one JAX device."""

    flops: float  # bfloat16 FLOP/s
    bandwidth: float  # bytes/s between HBM and chip
    memory: float  # bytes of HBM
    ici: float  # bytes/s that it sends to its two neighbours along one axis of the torus
    devices: int = 1  # JAX devices of a chip, which is what has a price


GIB = 2**30
CHIPS = {
    "v5e": Chip(flops=197e12, bandwidth=819e9, memory=16 * GIB, ici=100e9),
    "v5p": Chip(flops=459e12, bandwidth=2765e9, memory=95 * GIB, ici=200e9),
    "v6e": Chip(flops=918e12, bandwidth=1638e9, memory=32 * GIB, ici=200e9),
    "tpu7x": Chip(flops=2307e12 / 2, bandwidth=7380e9 / 2, memory=192 * GIB / 2, ici=200e9 / 2, devices=2),
}


def of_topology(topology: str) -> Chip:
    """The chip of a topology name such as "v5e:2x2".

    Raises:
      ValueError: if it names no chip in the table.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"topology must be CHIP:SIZE with a chip of {', '.join(CHIPS)}, got {topology!r}")
    return CHIPS[name]


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, for the compiler of the libtpu wheel.

    Raises:
      ValueError: if it names no chip in the table, or there is no slice of that size.
    """
    of_topology(topology)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology must be CHIP:SIZE with a size that exists, got {topology!r}: {error}") from None

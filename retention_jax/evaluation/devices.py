"""What is known of devices: memory, time spent compiling, and whether a model is on this process's devices alone."""

import functools
from collections.abc import Iterable
from typing import Any

import jax

from retention_jax.models.decoder import Decoder
from retention_jax.parallel import checksum


def program_bytes(sizes: Any) -> int | None:
    """Memory of a device that a compiled program needs at once, by its `memory_analysis()`; None where it has none."""
    if sizes is None:
        return None
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + outputs


def largest_program() -> int | None:
    """`program_bytes` of the largest program of this process that `jax.clear_caches` has not freed."""

    def sizes(program: Any) -> Any:
        try:
            return program.get_compiled_memory_stats()
        except jax.errors.JaxRuntimeError:  # not every platform tells
            return None

    return most(program_bytes(sizes(program)) for program in jax.local_devices()[0].client.live_executables())


def most(numbers: Iterable[int | None]) -> int | None:
    return max((number for number in numbers if number is not None), default=None)


def is_own(model: Decoder) -> bool:
    """Whether all of the model lies on this process's devices, so that it works without the others."""
    return all(array.is_fully_addressable for array in jax.tree.leaves(model) if isinstance(array, jax.Array))


def digest(model: Decoder) -> str:
    """A short name of all weights, gates and settings of a model; the same however it is laid out on devices."""
    return checksum.of(model, repr(model.config))


@functools.cache
def _compiling() -> list[float]:
    """Seconds of every compilation from now on."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def compile_seconds() -> float:
    """Seconds that this process has spent compiling since this was first called."""
    return sum(_compiling(), start=0.0)

"""Programs to measure or to estimate, how they are timed, and the ceilings of the device in the same run."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .settings import Work

Row = dict[str, float | int | str | bool | None]


class Case(NamedTuple):
    """One program on arguments of one size."""

    labels: Row  # what the table calls it
    program: Callable[..., Any]
    make: Callable[[], tuple]  # the arguments; runs under jit, so that they are made on the device
    tokens: int  # that a call processes
    work: Work
    donates: bool = False  # the first argument is given away and the first result takes its place
    versus: tuple[str, ...] = ()  # labels `what` of earlier cases of these sizes that do the same


class Ceilings(NamedTuple):
    """What the device was seen to do in this run."""

    bandwidth: float  # bytes/s of a copy, read and written
    flops: float  # FLOP/s of a matrix product in the model's dtype


def measure_ceilings(dtype: str, repeats: int) -> Ceilings:
    """Adds 1 to a large array, in place, and multiplies two large square matrices."""
    on_cpu = jax.default_backend() == "cpu"
    size, side = (2**27, 2048) if on_cpu else (2**28, 8192)
    x = jax.jit(lambda: jnp.ones(size, jnp.float32))()
    a = jax.jit(lambda: jnp.ones((side, side), dtype))()
    add, multiply = jax.jit(lambda x: x + 1, donate_argnums=0), jax.jit(lambda a: a @ a)

    def copy() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    nbytes = 2 * x.nbytes
    product = median_seconds(lambda: multiply(a), repeats)
    return Ceilings(nbytes / median_seconds(copy, repeats), 2 * side**3 / product)


_LEAST_SECONDS = 0.05  # of one timing: shorter calls are made several times without waiting in between


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, the median of several timings; the first call, which may compile, does not count."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    count = math.ceil(min(_LEAST_SECONDS / (time.perf_counter() - started), 100))
    timings = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)  # programs of one device run in order
        timings.append((time.perf_counter() - started) / count)
    return statistics.median(timings)


def available_bytes() -> int:
    """Memory that a program may still take."""
    stats = jax.devices()[0].memory_stats()
    if stats is None:  # a CPU
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats["bytes_limit"] - stats["bytes_in_use"]


def peak_bytes() -> int | None:
    """The most that this process has held at one time, where the device tells."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats["peak_bytes_in_use"]


class Memory(NamedTuple):
    """Bytes of a compiled program."""

    temporary: int
    total: int  # arguments and results besides


def memory_use(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler planned."""
    stats = compiled.memory_analysis()
    assert stats is not None  # CPU, GPU and TPU tell
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.temp_size_in_bytes, kept + stats.temp_size_in_bytes)


def rates(seconds: float, tokens: int, work: Work, ceilings: Ceilings) -> Row:
    """Columns of a time: speeds, and how much of the two ceilings the task's least work takes in that time."""
    return {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "gigabytes_per_second": work.bytes / seconds / 1e9,
        "teraflops": work.flops / seconds / 1e12,
        "of_bandwidth": work.bytes / seconds / ceilings.bandwidth,
        "of_matmul": work.flops / seconds / ceilings.flops,
    }


def measure(cases: Iterable[Case], ceilings: Ceilings, repeats: int) -> Iterator[Row]:
    """A row for each case, with its time beside that of the alternative it names."""
    times: dict[str, float] = {}
    for case in cases:
        row, seconds = _measure_one(case, ceilings, repeats)
        sizes = {name: value for name, value in case.labels.items() if name != "what"}
        times[f"{case.labels['what']} {sizes}"] = seconds
        if math.isfinite(seconds):
            earlier = {name: times[f"{name} {sizes}"] for name in case.versus}
            notes = [f"{time / seconds:.2f} x {name}" for name, time in earlier.items() if math.isfinite(time)]
            row["note"] = ", ".join(notes)
        yield row


def _measure_one(case: Case, ceilings: Ceilings, repeats: int) -> tuple[Row, float]:
    shapes = jax.eval_shape(case.make)
    compiled = jax.jit(case.program, donate_argnums=(0,) if case.donates else ()).lower(*shapes).compile()
    memory = memory_use(compiled)
    row = case.labels | {"temporary_bytes": memory.temporary}
    if memory.total > available_bytes():
        return row | {"note": f"does not fit: needs {memory.total / 2**30:.1f} GiB"}, math.inf
    held = jax.jit(case.make)()

    def call() -> Any:
        nonlocal held
        result = compiled(*held)
        if case.donates:
            held = (result[0], *held[1:])
        return result

    seconds = median_seconds(call, repeats)
    return row | rates(seconds, case.tokens, case.work, ceilings) | {"peak_bytes": peak_bytes()}, seconds


def random_prompts(vocab_size: int, batch: int, context: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, context))

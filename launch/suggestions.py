"""What to change about a program of one size on one mesh: where it does not fit, and where there is room left."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from retention_jax.config import CacheConfig, ModelConfig, TrainConfig

Report = dict[str, Any]  # as `compile_for_tpu.report` makes it


class Setup(NamedTuple):
    """One program of one size on one mesh."""

    program: str  # train, prefill or decode
    config: TrainConfig
    model: ModelConfig
    sizes: dict[str, int]  # of the mesh's axes
    cache: CacheConfig  # where not training

    @property
    def rows(self) -> int:
        """Into how many parts the mesh cuts the batch."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def batch(self) -> int:
        return self.config.data.batch_size

    @property
    def accumulation(self) -> int:
        return self.config.optimizer.accumulation


class Change(NamedTuple):
    text: str
    setup: Setup


def with_config(setup: Setup, **fields: Any) -> Setup:
    return setup._replace(config=dataclasses.replace(setup.config, **fields))


def with_data(setup: Setup, **fields: int | None) -> Setup:
    """With other fields of config.data, as far as they are given."""
    given = {name: value for name, value in fields.items() if value is not None}
    return with_config(setup, data=dataclasses.replace(setup.config.data, **given))


def with_batch(setup: Setup, batch: int) -> Change:
    return Change(f"batch {batch}", with_data(setup, batch_size=batch))


def smaller(setup: Setup) -> Iterator[Change]:
    """Single changes that take less memory, those first that cost least; none that its own sizes rule out."""
    changes = _smaller_training(setup) if setup.program == "train" else _smaller_inference(setup)
    for change in changes:
        if _possible(change.setup):
            yield change
    if setup.batch % (2 * setup.rows * setup.accumulation) == 0:
        yield with_batch(setup, setup.batch // 2)


def _smaller_training(setup: Setup) -> Iterator[Change]:
    config, sizes = setup.config, setup.sizes
    if not config.remat:
        yield Change("remat=True", with_config(setup, remat=True))
    if config.loss.vocab_block > 512:
        yield Change("loss.vocab_block=512", with_config(setup, loss=dataclasses.replace(config.loss, vocab_block=512)))
    if sizes["data"] > 1:
        moved = sizes | {"data": 1, "fsdp": setup.rows}
        yield Change(f"mesh fsdp {setup.rows} in place of data {sizes['data']}", setup._replace(sizes=moved))
    if setup.batch % (2 * setup.rows * setup.accumulation) == 0:
        optimizer = dataclasses.replace(config.optimizer, accumulation=2 * setup.accumulation)
        yield Change(f"optimizer.accumulation={optimizer.accumulation}", with_config(setup, optimizer=optimizer))
    # Half as many sequences at a time, each of them on twice as many devices.
    for axis in ("context", "tensor"):
        if (moved := _moved(setup, axis)) and setup.batch % (2 * setup.accumulation) == 0:
            half = with_data(moved, batch_size=setup.batch // 2)
            yield Change(f"mesh {axis} {moved.sizes[axis]} and half the batch", half)


def _smaller_inference(setup: Setup) -> Iterator[Change]:
    chunk = setup.cache.prefill_chunk
    if setup.program == "prefill" and chunk and chunk % 2 == 0:
        half = setup._replace(cache=dataclasses.replace(setup.cache, prefill_chunk=chunk // 2))
        yield Change(f"prefill_chunk {chunk // 2}", half)
    if moved := _moved(setup, "tensor"):
        yield Change(f"mesh tensor {moved.sizes['tensor']}", moved)


def _moved(setup: Setup, axis: str) -> Setup | None:
    """With an axis twice as large, and `data` or `fsdp` half; None where both are odd."""
    for other in ("data", "fsdp"):
        if setup.sizes[other] % 2 == 0:
            sizes = setup.sizes | {other: setup.sizes[other] // 2, axis: 2 * setup.sizes[axis]}
            return setup._replace(sizes=sizes)
    return None


def _possible(setup: Setup) -> bool:
    if setup.program == "train":
        try:
            setup.config.check_mesh(setup.sizes, setup.model)
        except ValueError:
            return False
        return True
    slots = setup.model.num_layers * setup.model.num_kv_heads * setup.cache.budget
    return setup.batch % setup.rows == 0 and slots % (setup.sizes["context"] * setup.sizes["tensor"]) == 0


def larger(setup: Setup, told: Report) -> Iterator[Change]:
    """Single changes that make more of the memory that a program leaves free, as far as can be told beforehand."""
    fixed = sum(told["bytes"].get(kind, 0) for kind in ("weights", "gates", "optimiser", "program"))
    by_row = sum(told["bytes"].values()) - fixed
    times = 2 ** math.floor(math.log2((told["memory"] - fixed) / by_row))
    if times > 1:
        yield with_batch(setup, times * setup.batch)
    free = told["memory"] - fixed - by_row
    if setup.program == "train" and setup.config.remat and _kept_without_remat(setup) < free:
        yield Change("remat=False", with_config(setup, remat=False))
    weights = told["bytes"].get("weights", 0)
    if told["bound_by"] == "ICI" and setup.sizes["fsdp"] % 2 == 0 and weights < free:
        moved = setup.sizes | {"data": 2 * setup.sizes["data"], "fsdp": setup.sizes["fsdp"] // 2}
        yield Change(f"mesh data {moved['data']}, fsdp {moved['fsdp']}", setup._replace(sizes=moved))


def _kept_without_remat(setup: Setup) -> float:
    """The fewest bytes a device that the backward pass needs of all layers: queries, keys, values, what attention and
    both norms give, and the three products of the MLP."""
    model, sizes, data = setup.model, setup.sizes, setup.config.data
    tokens = data.batch_size * data.length / (setup.rows * sizes["context"] * setup.accumulation)
    cut = 2 * model.num_heads * model.head_size + 2 * model.num_kv_heads * model.head_size + 3 * model.mlp_width
    each = cut / sizes["tensor"] + 3 * model.width
    return model.num_layers * tokens * each * jnp.dtype(model.dtype).itemsize


def search(setup: Setup, told: Report, compiled: Callable[[Setup], Report]) -> Iterator[Report]:
    """Reports of changed set-ups, each with its `change`.

    Where `setup`, of which `told` is the report, fits: what makes use of the room. Where it does not: single changes
    until one fits; if none does, the one that wants least memory is kept and further ones are tried with it.
    """
    if told["fits"]:
        for change in larger(setup, told):
            yield {"change": change.text} | compiled(change.setup)
        return
    kept, wanted = "", told["wanted"] or math.inf
    while True:
        tried: list[tuple[float, Change]] = []
        for change in smaller(setup):
            report: Report = {"change": kept + change.text} | compiled(change.setup)
            yield report
            if report["fits"]:
                return
            tried.append((report["wanted"] or math.inf, change))
        least, best = min(tried, key=lambda pair: pair[0], default=(math.inf, None))
        if best is None or least >= wanted:
            return
        setup, wanted, kept = best.setup, least, f"{kept}{best.text}, "


def advice(reports: list[Report]) -> str:
    """A line on what to do, once everything was tried: the first report is of what was asked."""
    fitting = [told for told in reports if told["fits"]]
    if not fitting:
        return "nothing that was tried fits"
    speed = lambda told: told["tokens"] / told["seconds"]
    best = max(fitting, key=speed)
    if best is reports[0]:
        return "suggestion: leave it as it is" if len(reports) > 1 else "suggestion: none, no memory is left to use"
    return f"suggestion: {best['change']}, at most {speed(best):,.0f} tokens/s"

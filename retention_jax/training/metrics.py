"""Where the numbers of a run go: JSON lines, TensorBoard events and one progress bar, which only process 0 writes; and
profiles of steps."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float
from tensorboardX import SummaryWriter

from retention_jax.config import TrainConfig
from retention_jax.runtime import files


def say(text: str) -> None:
    """Writes a line of progress to standard error, above the progress bar; process 0 only.

    It does not go through absl's log, because Orbax fills that log's INFO level.
    """
    if jax.process_index() == 0:
        tqdm.tqdm.write(text, file=sys.stderr)


class StepMetrics(NamedTuple):
    """What one training step tells. Losses in nats a token."""

    losses: dict[str, Float[Array, ""]]
    grad_norm: Float[Array, ""]
    retained: Float[Array, "L K"] | None  # gates only


class Meter:
    """Rates over the time since the first step ended, so that compilation does not count."""

    def __init__(self, tokens: int) -> None:
        """`tokens` is how many a step processes."""
        self._tokens = tokens
        self._start: tuple[int, float] | None = None

    def skip(self, seconds: float) -> None:
        """Leaves out seconds that were spent on something else."""
        if self._start is not None:
            self._start = (self._start[0], self._start[1] + seconds)

    def tick(self, step: int) -> dict[str, float]:
        """To be called when a step has ended. Steps and tokens a second; {} after the first step."""
        now = time.perf_counter()
        if self._start is None:
            self._start = (step, now)
            return {}
        rate = (step - self._start[0]) / (now - self._start[1])
        return {"steps_per_second": rate, "tokens_per_second": rate * self._tokens}


class MetricWriter:
    """Writes scalars of a step to `metrics.jsonl` and TensorBoard, and shows the newest ones beside a progress bar."""

    def __init__(self, workdir: pathlib.Path, *, first_step: int, steps: int, label: str):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        _forget_after(path, first_step)
        self._lines = files.open_json_lines(path)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm.tqdm(total=steps, initial=first_step, desc=label, unit="step", disable=not sys.stderr.isatty())

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Records the scalars of one step."""
        if self._active:
            files.append_json_line(self._lines, {"step": step, **scalars})
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def progress(self, step: int, shown: dict[str, str]) -> None:
        """Moves the bar to `step`."""
        if self._active:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._bar.close()
            self._events.close()
            self._lines.close()


def report(writer: MetricWriter, meter: Meter, config: TrainConfig, step: int, result: StepMetrics) -> None:
    """Shows a step's numbers, and writes them where it is time.

    Raises:
      FloatingPointError: when a loss is not finite; names the step.
    """
    loss = float(result.losses["loss"])  # waits for the step
    if not math.isfinite(loss) or not math.isfinite(float(result.grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss is {loss}, gradient norm {float(result.grad_norm)}; nothing was saved"
        )
    rates = meter.tick(step)
    writer.progress(step, {"loss": f"{loss:.4f}", **{name: f"{rate:,.0f}" for name, rate in rates.items()}})
    if step % config.log_every == 0 or step == config.steps:
        scalars = {name: float(value) for name, value in result.losses.items()}
        scalars |= {"grad_norm": float(result.grad_norm), **rates}
        if result.retained is not None:
            for (l, h), value in np.ndenumerate(np.asarray(result.retained)):
                scalars[f"retained/layer{l}_head{h}"] = float(value)
        writer.write(step, scalars)
        if step % (10 * config.log_every) == 0 or step == config.steps:
            say(f"step {step} of {config.steps}: loss {loss:.4f}, {_spoken(rates)}")


def _spoken(rates: dict[str, float]) -> str:
    return ", ".join(f"{value:,.1f} {name.replace('_', ' ')}" for name, value in rates.items())


@contextlib.contextmanager
def profiler(folder: pathlib.Path, first: int, count: int) -> Iterator[Callable[[int], None]]:
    """A function to call before each step: traces `count` steps from the step `first` on into a folder."""
    tracing = False

    def before(step: int) -> None:
        nonlocal tracing
        inside = first <= step < first + count
        if inside and not tracing:
            jax.profiler.start_trace(str(folder))
        if tracing and not inside:
            jax.profiler.stop_trace()
        tracing = inside

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()


def _forget_after(path: pathlib.Path, step: int) -> None:
    """Drops the lines of steps that will be run again."""
    values = files.read_json_lines(path).values
    kept = [value for value in values if isinstance(value, dict) and value.get("step", step + 1) <= step]
    if len(kept) < len(values):
        text = b"".join(files.json_line(value) + b"\n" for value in kept)
        files.write_atomically(path, lambda temporary: temporary.write_bytes(text))

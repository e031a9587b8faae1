"""Where the numbers of a run go: JSON lines, TensorBoard events and one progress bar. Only process 0 writes."""

import json
import pathlib
import sys
from types import TracebackType

import jax
import tqdm
from tensorboardX import SummaryWriter

from retention_jax.runtime import files


def say(text: str) -> None:
    """Tells the user where a run is: a line on standard error, above the progress bar, from process 0.

    Not absl's log, whose INFO level is full of what Orbax does.
    """
    if jax.process_index() == 0:
        tqdm.tqdm.write(text, file=sys.stderr)


class MetricWriter:
    """Writes scalars of a step to `metrics.jsonl` and TensorBoard, and shows the newest ones beside a progress bar."""

    def __init__(self, workdir: pathlib.Path, *, first_step: int, steps: int, label: str):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        _forget_after(path, first_step)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm.tqdm(total=steps, initial=first_step, desc=label, unit="step", disable=not sys.stderr.isatty())

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Records the scalars of one step."""
        if self._active:
            self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
            self._lines.flush()
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


def _forget_after(path: pathlib.Path, step: int) -> None:
    """Drops lines of steps that will be run again, and a line that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    files.write_atomically(path, lambda p: p.write_text("".join(kept)))

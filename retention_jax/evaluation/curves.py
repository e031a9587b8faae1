"""Scores while training: the run's evaluation at some of its checkpoints, with their steps.

    scores.jsonl   a line for each evaluated step: `step`, and `rows`, as in results.json
    curves.png     scores and losses against steps
    step_N/        what the evaluation of step N wrote; that of the last step is the run's own, in `eval/`

What depends on no gate is scored once, at the first evaluated step, and again at the last.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import jax

from retention_jax.config import TrainConfig
from retention_jax.evaluation import buffers, plan, plots
from retention_jax.evaluation.rows import Row
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import distributed
from retention_jax.runtime import files
from retention_jax.text.tokenizer import Tokenizer


class Scored(NamedTuple):
    """One evaluated step."""

    step: int
    rows: list[Row]


def due(config: TrainConfig, step: int) -> bool:
    """Whether a step is evaluated: every `eval_every` steps, and the last."""
    return config.eval_every > 0 and step > 0 and (step % config.eval_every == 0 or step == config.steps)


def evaluate(
    model: Decoder, config: TrainConfig, workdir: pathlib.Path, step: int, tokenizer: Tokenizer | None, *, resumed: bool
) -> dict[str, float]:
    """Scores a step, unless that was done before, and draws the curves until then. All processes must call it.

    Args:
      model: the backbone with the step's gates.
      config: the run's.
      workdir: the run's; results go to `workdir/curves`.
      step: a step that is `due`.
      tokenizer: as for `plan.run`.
      resumed: whether the gates are those of a checkpoint, bit for bit, so that a half-done evaluation of them may go
        on. If not, it is begun anew.

    Returns:
      The scores by names for metrics; {} where a resumed run wrote them before.

    Raises:
      ValueError: as `plan.run` does.
    """
    folder = workdir / "curves"
    before = [Scored(step, rows) for step, rows in _of_first_process(read(folder))]
    found = next((scored.rows for scored in before if scored.step == step), None)
    if found is not None and resumed:
        return {}
    if found is None:
        output = workdir / "eval" if step == config.steps else folder / f"step_{step}"
        if jax.process_index() == 0 and not resumed and output.parent == folder:
            shutil.rmtree(output, ignore_errors=True)
        distributed.gather("")
        known = {row.policy for scored in before for row in scored.rows}
        changing = lambda name: config.stage == "backbone" or buffers.uses_gates(name)
        policies = [n for n in config.eval.policies if step == config.steps or changing(n) or n not in known]
        asked = dataclasses.replace(config.eval, policies=tuple(policies)) if policies else None
        found = plan.run(model, asked, config.data, output, tokenizer) if asked else []
        if jax.process_index() == 0:
            rows = [row._asdict() for row in found]
            files.append_json_line(folder / "scores.jsonl", {"step": step, "rows": rows})
    if jax.process_index() == 0:
        draw(workdir)
    return {f"eval/{row.task}/{row.length}/{row.policy}_{row.budget}": row.score for row in found}


def _of_first_process(scored: Sequence[Scored]) -> list[tuple[int, list[Row]]]:
    """What process 0 read: files reach some processes later."""
    lines = [[step, [row._asdict() for row in rows]] for step, rows in scored]
    found = json.loads(distributed.gather(json.dumps(lines))[0])
    return [(step, [Row(**row) for row in rows]) for step, rows in found]


def read(folder: pathlib.Path) -> list[Scored]:
    """Every evaluated step of `workdir/curves`, in order.

    Raises:
      ValueError: on a line that `evaluate` did not write.
    """
    found, path = [], folder / "scores.jsonl"
    for number, line in enumerate(files.read_json_lines(path).values, 1):
        try:
            found.append(Scored(line["step"], [Row(**row) for row in line["rows"]]))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: no scores of a step: {error}") from None
    return sorted(found, key=lambda scored: scored.step)


def draw(workdir: pathlib.Path) -> None:
    """Draws `curves/curves.png` from what a run wrote so far."""
    lines = files.read_json_lines(workdir / "metrics.jsonl").values
    losses = [line for line in lines if isinstance(line, dict) and "loss" in line]
    scored = read(workdir / "curves")
    path = workdir / "curves" / "curves.png"
    files.write_atomically(path, lambda temporary: plots.curves(scored, losses, temporary))

"""Jinja chat templates, rendered in a process of their own.

A template comes with a checkpoint and is not trusted. Jinja's sandbox keeps it away from Python; it cannot keep it from
looping for ever or from filling memory. So `template_program.py` renders it, under a memory limit, and is killed when
it takes too long.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from retention_jax.runtime.worker_process import Worker

TIME_LIMIT = 20.0  # seconds for one call of `render`
OUTPUT_LIMIT = 2**26  # characters of one text

_worker = Worker(pathlib.Path(__file__).with_name("template_program.py"), "renders chat templates")


class Rendered(NamedTuple):
    """A rendered template, and the [start, end) of what its `{% generation %}` blocks wrote."""

    text: str
    generated: list[tuple[int, int]]


def render(template: str, jobs: Sequence[dict[str, Any]], *, where: object) -> list[Rendered]:
    """Renders one template once for each set of variables.

    Args:
      template: Jinja source.
      jobs: variables of each rendering; plain JSON values.
      where: what to call the template in messages.

    Raises:
      ValueError: when the template is not valid, raises, reaches outside its sandbox, takes more than `TIME_LIMIT`
        seconds, or writes more than `OUTPUT_LIMIT` characters; or when a variable is not a JSON value.
    """
    try:
        request = json.dumps({"template": template, "jobs": list(jobs), "limit": OUTPUT_LIMIT})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: chat template variables must be JSON values: {error}") from None
    try:
        answer = json.loads(_worker.ask(request, TIME_LIMIT))
    except TimeoutError:
        raise ValueError(
            f"{where}: chat template took more than {TIME_LIMIT:g} seconds; does it loop for ever?"
        ) from None
    except ChildProcessError:
        raise ValueError(f"{where}: chat template ended its process, out of memory; does it loop for ever?") from None
    if "error" in answer:
        raise ValueError(f"{where}: chat template: {answer['error']}")
    return [Rendered(text, [(start, end) for start, end in spans]) for text, spans in answer["rendered"]]

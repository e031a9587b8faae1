"""LongProc: answers of up to 8,000 tokens that follow a procedure step by step (arXiv 2501.05414).

    countdown        search for a way from four numbers to a target, and tell the search
    path_traversal   follow one-way links between cities
    tom_tracking     track where a thing is and where somebody believes it is

Prompts and scores are those of github.com/princeton-pli/LongProc, `longproc/longproc_data.py` and the evaluators beside
it; published runs are greedy. `html_to_tsv`, `pseudo_to_code` and `travel_planning` are left out: they need pages of
web sites, a compiler and a run of what a model writes, and another search.

Rows are those of the repository's `data/NAME/NAME_SIZE.json`; `prompts.yaml`, which lies beside it, is read too.
"""

import functools
import re
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from retention_jax.data import sources
from retention_jax.tasks import countdown
from retention_jax.tasks.example import Example, Task, Turn
from retention_jax.tasks.rows import checked_rows, known, lacking

_Row = dict[str, Any]


class _SubTask(NamedTuple):
    problems: Callable[[_Row], list[str]]
    fields: Callable[[_Row], dict[str, str]]  # of the prompt; the first ends what is read before the question is known
    reference: Callable[[_Row], str]  # a right answer
    is_right: Callable[[_Row, str], bool]  # of an answer
    steps: Callable[[str], list[str]]  # lines of an answer that are compared, one by one, with the reference's
    same: Callable[[str, str], bool]  # whether a line is right, beside the reference's


_MAX_NEW_TOKENS = {"0.5k": 1024, "2k": 3072, "8k": 9216}
METRICS = ("accuracy", "partial_accuracy")


def load(name: str, source: str, metric: str) -> Task:
    """One of LongProc's tasks, `NAMES`, scored by one of its `METRICS`.

    "accuracy" is 1 for an answer that is right as a whole. "partial_accuracy" is 1 for it too, otherwise the share of
    the reference's lines that stand before the answer's first wrong one; the published script is one line off, towards
    more in path_traversal and towards less in countdown.

    Raises:
      ValueError: when there is no such task or metric, when the prompt is missing or not understood, and as
        `checked_rows` does.
    """
    known(name, NAMES, "LongProc")
    if metric not in METRICS:
        raise ValueError(f"{metric!r} must be a metric of LongProc, {' or '.join(METRICS)}")
    plain, _, size = name.rpartition("_")
    task = _SUB_TASKS[plain]
    rows = checked_rows(source, task.problems)
    prompt = _prompt(source, list(task.fields(rows[0])))
    examples = []
    for number, row in enumerate(rows, 1):
        context, question = prompt(task.fields(row))
        turn = Turn(question, (task.reference(row),), _MAX_NEW_TOKENS[size])
        examples.append(Example(str(number), context, (turn,)))

    def score(example: Example, turn: int, answer: str) -> float:
        if task.is_right(rows[int(example.name) - 1], answer):
            return 1.0
        if metric == "accuracy":
            return 0.0
        done, steps = task.steps(answer), task.steps(example.turns[turn].gold[0])
        wrong = (i for i, pair in enumerate(zip(done, steps, strict=False)) if not task.same(*pair))
        return next(wrong, min(len(done), len(steps))) / len(steps)

    return Task(tuple(examples), metric, score, True, "arXiv 2501.05414, github.com/princeton-pli/LongProc")


def _prompt(source: str, fields: list[str]) -> Callable[[dict[str, str]], tuple[str, str]]:
    """Context and question of given fields, in the prompt that lies beside a source: to the first field's end, and on.

    As `str.format` fills it, but braces in a field's text are text.
    """
    path = sources.beside(source, "prompts.yaml")
    try:
        prompt = yaml.safe_load(path.read_text(encoding="utf-8"))["USER_PROMPT"]
        parts = [(before, field) for before, field, *_ in string.Formatter().parse(prompt)]
    except OSError as error:
        raise ValueError(f"{path}: the prompt must lie beside {source}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: needs USER_PROMPT, a text with fields in braces: {error}") from error
    found = [field for _, field in parts if field is not None]
    if found != fields:
        raise ValueError(
            f"{path}: the fields of USER_PROMPT must be {', '.join(fields)}, not {', '.join(found) or 'none'}"
        )

    def filled(values: dict[str, str]) -> tuple[str, str]:
        texts = [before + values.get(field or "", "") for before, field in parts]
        end = [field for _, field in parts].index(fields[0]) + 1
        return "".join(texts[:end]), "".join(texts[end:])

    return filled


def _tagged(answer: str, tag: str) -> str | None:
    """What stands between the first <tag> and the first </tag>; None where one is missing."""
    start, end = answer.find(f"<{tag}>"), answer.find(f"</{tag}>")
    return None if start < 0 or end < 0 else answer[start + len(tag) + 2 : end].strip()


# countdown

_SHOWN = (((40, 19, 23, 7), 29), ((9, 16, 6, 18), 12))  # numbers and target of the prompt's worked examples


def _countdown_problems(row: _Row) -> list[str]:
    if found := lacking(row, {"nums": list, "target": int}):
        return found
    numbers, largest = row["nums"], countdown.LARGEST
    if len(numbers) != countdown.NUMBERS or not all(isinstance(n, int) and 0 < n <= largest for n in numbers):
        return [f"'nums' must be {countdown.NUMBERS} whole numbers from 1 to {largest}, not {numbers}"]
    if countdown.search(numbers, row["target"]) is None:
        return [f"'target' cannot be reached: {row['target']} from {numbers}"]
    return []


def _countdown_fields(row: _Row) -> dict[str, str]:
    return {"demonstration": _demonstration(), "nums": str(row["nums"]), "target": str(row["target"])}


@functools.cache
def _demonstration() -> str:
    shown = [
        f"# Example\nNumbers: {list(numbers)}\nTarget: {target}\n\n{_found(numbers, target)}"
        for numbers, target in _SHOWN
    ]
    return "\n\n".join(shown)


def _found(numbers: tuple[int, ...] | list[int], target: int) -> str:
    found = countdown.search(numbers, target)
    assert found is not None
    return found.text()


def _countdown_is_right(row: _Row, answer: str) -> bool:
    solution = _tagged(answer, "Solution")
    return solution is not None and countdown.is_solution(row["nums"], row["target"], solution)


def _countdown_steps(answer: str) -> list[str]:
    trace = answer.rpartition(countdown.HEADING)[2].partition(countdown.FOUND)[0]
    return trace.strip().split("\n") if countdown.HEADING in answer else []


# path_traversal


def _path_problems(row: _Row) -> list[str]:
    found = lacking(row, {"context_nl": str, "question_repr": list, "answer_nl": str})
    cities = row.get("question_repr") if isinstance(row, dict) else None
    if isinstance(cities, list) and (len(cities) != 2 or not all(isinstance(city, str) for city in cities)):
        found.append(f"'question_repr' must be two texts, from where and to where, not {cities}")
    if not found and not row["answer_nl"].strip():
        found.append("'answer_nl' must not be empty")
    return found


def _path_fields(row: _Row) -> dict[str, str]:
    start, end = row["question_repr"]
    return {"city_context": row["context_nl"], "src_city": start, "dst_city": end}


# tom_tracking

_STEP = re.compile(r"^- (Step \d+:.*)", re.MULTILINE)
_UNCOMPARED = (
    *("a", "an", "the", "on", "in", "at", "step", "thinks", "think", "believes", "believe", "is", "are", "of"),
    *("location", "know", "knows", "belief"),
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "’")


def _tom_problems(row: _Row) -> list[str]:
    found = lacking(row, {"story": str, "question": str, "solution": str})
    if not found and not _tom_steps(row["solution"]):
        found.append("'solution' must have lines that begin with \"- Step 0:\" and so on")
    return found


def _tom_steps(answer: str) -> list[str]:
    """The steps from the last that has the number 0, with neither case, punctuation nor words that do not matter."""
    traced = answer[max(answer.rfind("- Step 0:"), 0) :].strip()
    bare = [step.lower().translate(_NO_PUNCTUATION).split() for step in _STEP.findall(traced)]
    return [" ".join(word for word in words if word not in _UNCOMPARED) for words in bare]


_SUB_TASKS = {
    "countdown": _SubTask(
        _countdown_problems,
        _countdown_fields,
        lambda row: _found(row["nums"], row["target"]),
        _countdown_is_right,
        _countdown_steps,
        countdown.same_step,
    ),
    "path_traversal": _SubTask(
        _path_problems,
        _path_fields,
        lambda row: f"<Route>\n{row['answer_nl'].strip()}\n</Route>",
        lambda row, answer: _tagged(answer, "Route") == row["answer_nl"].strip(),
        lambda answer: (_tagged(answer, "Route") or "").split("\n"),
        str.__eq__,
    ),
    "tom_tracking": _SubTask(
        _tom_problems,
        lambda row: {"story": row["story"], "question": row["question"]},
        lambda row: row["solution"],
        lambda row, answer: _tom_steps(answer) == _tom_steps(row["solution"]),
        _tom_steps,
        str.__eq__,
    ),
}
NAMES = tuple(f"{name}_{size}" for name in _SUB_TASKS for size in _MAX_NEW_TOKENS)

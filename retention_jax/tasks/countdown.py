"""The game of LongProc's countdown: reach a target from four numbers, each used once.

The search and its wording are those of github.com/princeton-pli/LongProc, `longproc/countdown_evaluator.py`, since
prompts show them and answers are compared with them.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

HEADING = "# Search Procedure"
FOUND = "Now we have found the target"  # ends the search
NUMBERS = 4
LARGEST = 1999  # number that the search goes on with

_EQUATION = re.compile(r"\s*(-?\d{1,9})\s*([-+*/])\s*(-?\d{1,9})\s*=\s*(-?\d{1,9})\s*", re.ASCII)


class Search(NamedTuple):
    """A way to the target and the way it was found."""

    trace: str  # a line for each thing tried
    solution: tuple[str, ...]  # NUMBERS - 1 equations, "21 + 16 = 37"

    def text(self) -> str:
        """The whole answer that a prompt asks for."""
        first, second, last = self.solution
        return (
            f"{HEADING}\n{self.trace}\n\n{FOUND}, let's trace back the solution:\n"
            f"Final step: {last}\nThe step before: {second}\nThe first step: {first}\n\n"
            f"Output the solution in the required format:\n<Solution>\n{first}\n{second}\n{last}\n</Solution>\n"
        )


def search(numbers: Sequence[int], target: int) -> Search | None:
    """What a depth-first search over pairs of numbers, the larger one first, finds and tells; None: there is no way."""
    pairs = list(itertools.combinations(numbers, 2))
    trace = [f"Initial number set: {list(numbers)}, target: {target}. Options for choosing two numbers: {pairs}."]
    solution = _found(list(numbers), target, 1, trace)
    return Search("\n".join(trace), solution) if solution else None


def _found(numbers: list[int], target: int, depth: int, trace: list[str]) -> tuple[str, ...] | None:
    for i, j in itertools.combinations(range(len(numbers)), 2):
        left = [number for k, number in enumerate(numbers) if k not in (i, j)]
        if left:
            pair = f"({numbers[i]}, {numbers[j]})"
            trace.append(f"{' ' * depth}|- Pick two numbers {pair} (numbers left: {left}). Try possible operations.")
        for equation, result in _results(*sorted((numbers[i], numbers[j]), reverse=True)):
            told = f"{' ' * (depth + bool(left))}|- Try {equation}."
            if result is None:
                trace.append(f"{told} drop this branch.")
            elif isinstance(result, float):
                trace.append(f"{told} {result:.1f} is a decimal, drop this branch.")
            elif result > LARGEST:
                trace.append(f"{told} {result} exceeds the maximum intermediate result, drop this branch.")
            elif not left:
                is_found = result == target
                sign, what = ("==", "target found!") if is_found else ("!=", "drop this branch.")
                trace.append(f"{told} Evaluate {result} {sign} {target}, {what}")
                if is_found:
                    return (equation,)
            else:
                now = [result, *left]
                pairs = f". Options for choosing two numbers: {list(itertools.combinations(now, 2))}."
                rest = ", just two numbers left." if len(now) == 2 else pairs
                trace.append(
                    f"{told} Add {result} to the number set. Current number set: {now}, target: {target}{rest}"
                )
                if further := _found(now, target, depth + 2, trace):
                    return (equation, *further)
    return None


def _results(a: int, b: int) -> Iterator[tuple[str, int | float | None]]:
    """The four equations of two numbers, a >= b, with their results: a float is no whole number, None is undefined."""
    yield f"{a} + {b} = {a + b}", a + b
    yield f"{a} - {b} = {a - b}", a - b
    yield f"{a} * {b} = {a * b}", a * b
    if b == 0:
        yield f"{a} / {b} (invalid operation)", None
    elif a % b:
        yield f"{a} / {b} = {a / b:.1f}", a / b
    else:
        yield f"{a} / {b} = {a // b}", a // b


def is_solution(numbers: Sequence[int], target: int, text: str) -> bool:
    """Whether a text has one equation a line, and they are right, use up all numbers and reach the target.

    A division leaves no remainder. Results may be negative or large, as in the published script: only its prompt
    forbids that.
    """
    left, lines = list(numbers), text.strip().split("\n")
    if len(lines) != len(numbers) - 1:
        return False
    for line in lines:
        if (match := _EQUATION.fullmatch(line)) is None:
            return False
        a, b, result = (int(match[group]) for group in (1, 3, 4))
        is_right = {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": b != 0 and a == b * result}
        for number in (a, b):
            if number not in left:
                return False
            left.remove(number)
        if not is_right[match[2]]:
            return False
        left.append(result)
    return left == [target]


def same_step(line: str, reference: str) -> bool:
    """Whether a line of a trace does what the reference's does; what comes of a calculation may be told otherwise."""
    if "|- Try" not in reference or line == reference:
        return line == reference
    dropped = "drop this branch"
    return line.split("=")[0] == reference.split("=")[0] and (dropped in line) == (dropped in reference)

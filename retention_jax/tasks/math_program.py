"""Compares answers to maths problems with math-verify: the program that `math_answers.py` starts and kills.

It imports nothing but the standard library and math-verify.
"""

import json
import logging
import re
import sys
from typing import Any

import math_verify

_MEMORY_LIMIT = 2**32  # bytes of this process, on Linux


def _main() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that somebody else must watch the time
    # All that an answer may be: LaTeX first, since "3x + 1" in a box also looks like the number 3.
    kinds = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]

    def parse(text: str) -> list:
        return math_verify.parse(text, kinds, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def is_right(marked: list[str], tail: str, gold: str) -> bool:
        answers = [value for result in marked for value in parse(_boxed(result))] or parse(tail)
        pairs = [(right, answer) for right in parse(_boxed(gold)) for answer in answers]
        return any(
            math_verify.verify([right], [answer], timeout_seconds=None) and not _tiny_and_apart(right, answer)
            for right, answer in pairs
        )

    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(is_right(**json.loads(line))), flush=True)


def _tiny_and_apart(right: Any, answer: Any) -> bool:
    """Whether two numbers look alike only because math-verify rounds to six decimals: three digits must agree."""
    numbers = all(getattr(value, "is_number", False) and value.is_extended_real for value in (right, answer))
    if not numbers or right == answer:
        return False
    largest = max(abs(right), abs(answer))
    return bool(largest.evalf() < 1e-3 and abs(right - answer).evalf() > 5e-3 * largest.evalf())


def _boxed(result: str) -> str:
    """As math-verify reads a result without looking for one. Dollar signs are money here, not LaTeX's."""
    without_dollars = re.sub(r"\\?[$]", "", result)
    return rf"\boxed{{{without_dollars}}}"


if __name__ == "__main__":
    _main()

"""Compares answers to maths problems with math-verify: the program that `math_answers.py` starts and kills.

It imports nothing but the standard library and math-verify.
"""

import json
import logging
import re
import sys

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

    def is_right(marked: str | None, tail: str, gold: str) -> bool:
        answer = parse(tail if marked is None else _boxed(marked))
        return math_verify.verify(parse(_boxed(gold)), answer, timeout_seconds=None)

    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(is_right(**json.loads(line))), flush=True)


def _boxed(result: str) -> str:
    """As math-verify reads a result without looking for one. Dollar signs are money here, not LaTeX's."""
    without_dollars = re.sub(r"\\?[$]", "", result)
    return rf"\boxed{{{without_dollars}}}"


if __name__ == "__main__":
    _main()

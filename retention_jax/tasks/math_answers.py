"""Whether an answer to a maths problem is right: math-verify, in a process of its own.

What a model writes is not trusted: `9^{9^{9^9}}` keeps SymPy busy for ever and cannot be interrupted from Python. So
`math_program.py` compares, under a memory limit, and is killed when it takes too long.
"""

import json
import pathlib
import re

from retention_jax.runtime.worker_process import Worker

TIME_LIMIT = 10.0  # seconds for one comparison
_TAIL = 500  # characters of an answer without a mark that are searched for its result

_worker = Worker(pathlib.Path(__file__).with_name("math_program.py"), "compares answers")


def final_answer(answer: str) -> str | None:
    r"""What an answer marks as its result: the last `\boxed{...}`, or what follows the last `####`; None if neither.

    `\boxed` is asked for by the prompts, `####` is how GSM8K's solutions end. A box that is not closed does not count.
    """
    starts = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", answer)]
    for start in reversed(starts):
        if (end := _closing_brace(answer, start)) is not None:
            return answer[start:end].strip()
    marked = re.findall(r"####(.*)", answer)
    return marked[-1].strip() if marked else None


def marked(answer: str) -> str:
    """Only what an answer marks as its result, marked; "" where it marks none.

    For answers that their limit cut off: a number that they got to is no result. R-KV's newer grader
    (github.com/Zefan-Cai/R-KV, `HuggingFace/run_hybrid_math.py`) takes unmarked results of whole answers only too.
    """
    result = final_answer(answer)
    return "" if result is None else rf"\boxed{{{result}}}"


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace closes that was opened just before `start`."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are not braces of LaTeX's
        if depth == 0:
            return match.start()
    return None


def is_right(answer: str, gold: str) -> bool:
    """Whether the result that `answer` ends in equals `gold`, as numbers, expressions, sets, intervals or words.

    Args:
      answer: all that the model wrote; without a mark (`final_answer`), its last numbers or formulas count.
      gold: LaTeX or a number, without marks.

    An answer that takes more than `TIME_LIMIT`, or ends a fresh comparing process, is wrong.
    """
    marked = final_answer(answer)
    if marked is not None and _bare(marked) == _bare(gold):
        return True
    request = json.dumps({"marked": marked, "tail": answer[-_TAIL:], "gold": gold})
    try:
        return json.loads(_worker.ask(request, TIME_LIMIT))
    except (TimeoutError, ChildProcessError):
        return False


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)

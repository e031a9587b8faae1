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


# Words of a unit; single letters too, but none that is a variable's name. Not those that join two results.
_WORD = (
    r"(?!(?:or|and|to|plus|minus|times|over|if|for)\b)(?:[^\W\d_]{2,}\.?|[°mgshLNJWVAKC](?![^\W\d_]))"
    r"(?:\^\{?[23]\}?|[²³])?"
)
_NUMBER = r"[-+]?\s*(?:\\?[$€£])?\s*[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?"
_WITH_UNIT = re.compile(rf"({_NUMBER})\s*{_WORD}(?:(?:\s+|\s*/\s*|-){_WORD})*")
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(rf"({_NUMBER})\s*({'|'.join(_SCALES)})\b.*")
_LABEL = re.compile(r"(?:the\s+)?(?:final\s+)?(?:answer|result|total)(?:\s+is|\s*[:=])+\s*", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;:! ]|~|\\q?quad\b")


def final_answer(answer: str) -> str | None:
    r"""What an answer marks as its result: the last `\boxed{...}`, or what follows the last `####`; None if neither.

    `\boxed` is asked for by the prompts, `####` is how GSM8K's solutions end. A box that is empty or not closed does
    not count. `####` counts at the start of a line that is a number or formula: it begins headings too.
    """
    starts = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", answer)]
    for start in reversed(starts):
        end = _closing_brace(answer, start)
        if end is not None and re.search(r"\w", _cleaned(answer[start:end])):
            return answer[start:end].strip()
    lines = re.findall(r"^[ \t]*####(?!#)(.*)$", answer, re.MULTILINE)
    results = [line.strip() for line in lines if _is_formula(_cleaned(line))]
    return results[-1] if results else None


def _is_formula(text: str) -> bool:
    """Whether a text has a digit, and no word beside LaTeX's commands."""
    return re.search(r"\d", text) is not None and not re.search(r"[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", "", text))


def _cleaned(result: str) -> str:
    """A result without what stands around it: label, emphasis, wrapping in `\\text`, full stop and unit."""
    while (unwrapped := _WRAPPED.sub(r" \1", result)) != result:
        result = unwrapped
    result = re.sub(r"(?<=\d)(?:\\[,;:! ]|~|\{,\})+(?=\d{3}(?!\d))", "", result)  # of thousands
    result = _SPACE.sub(" ", result).replace("**", " ").replace("__", " ").strip()
    result = _LABEL.sub("", result, count=1) if _LABEL.match(result) else result
    result = re.sub(r"^([*`_])(.*)\1$", r"\2", result.strip().removesuffix(".").strip()).removesuffix(".").strip()
    if scaled := _SCALED.fullmatch(result):
        return f"{scaled[1]} \\times {_SCALES[scaled[2]]}"
    return with_unit[1].strip() if (with_unit := _WITH_UNIT.fullmatch(result)) else result


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
      answer: all that the model wrote; without a mark (`final_answer`) that can be read, its last numbers or formulas
        count. A mark is read with and without what stands around the result, such as its unit.
      gold: LaTeX or a number, without marks.

    An answer that takes more than `TIME_LIMIT`, or ends a fresh comparing process, is wrong.
    """
    marked = final_answer(answer)
    if marked is not None and _bare(gold) in (_bare(marked), _bare(_cleaned(marked))):
        return True
    results = [] if marked is None else list(dict.fromkeys((marked, _cleaned(marked))))
    request = json.dumps({"marked": results, "tail": answer[-_TAIL:], "gold": gold})
    try:
        return json.loads(_worker.ask(request, TIME_LIMIT))
    except (TimeoutError, ChildProcessError):
        return False


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)

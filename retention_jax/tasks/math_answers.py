"""Whether an answer to a maths problem is right: math-verify, in a process of its own.

What a model writes is not trusted: `9^{9^{9^9}}` keeps SymPy busy for ever and cannot be interrupted from Python. So
this file is also a program, which compares one answer for each line of its standard input under a memory limit, and
which is killed when it takes too long.
"""

import json
import os
import re
import subprocess
import sys
import threading

TIME_LIMIT = 10.0  # seconds for one comparison
_MEMORY_LIMIT = 2**32  # bytes of the comparing process, on Linux
_TAIL = 500  # characters of an answer without a mark that are searched for its result


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


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace closes that was opened just before `start`."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are not braces of LaTeX's
        if depth == 0:
            return match.start()
    return None


class Checker:
    """Compares answers, in a process that is started when first needed; closing it, or leaving its `with`, ends that.

    One comparison at a time, from any thread.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._time_limit = time_limit
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        os.register_at_fork(after_in_child=self._forget)

    def is_right(self, answer: str, gold: str) -> bool:
        """Whether the result that `answer` ends in equals `gold`, as numbers, expressions, sets, intervals or words.

        Args:
          answer: all that the model wrote; without a mark (`final_answer`), its last numbers or formulas count.
          gold: LaTeX or a number, without marks.

        An answer that takes more than the time limit, or ends the comparing process, is wrong.
        """
        marked = final_answer(answer)
        if marked is not None and _bare(marked) == _bare(gold):
            return True
        request = json.dumps({"marked": marked, "tail": answer[-_TAIL:], "gold": gold})
        return json.loads(self._ask(request) or "false")

    def close(self) -> None:
        with self._lock:
            self._stop()

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: str) -> str:
        """The comparing process's answer, or "" when it had to be killed or ended by itself."""
        with self._lock:
            process = self._process = self._process or _start()
            assert process.stdin and process.stdout
            expired = threading.Event()
            timer = threading.Timer(self._time_limit, lambda: (expired.set(), process.kill()))
            timer.start()
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # Ctrl-C: the next request must not read this one's answer
                self._stop()
                raise
            finally:
                timer.cancel()
            if expired.is_set() or not answer.endswith("\n"):
                self._stop()
                return ""
            return answer

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _forget(self) -> None:
        """In a forked process: the pipes belong to the parent."""
        self._lock, self._process = threading.Lock(), None


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for the program that uses it
    )
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"the process that compares answers did not start: {sys.executable} -m {__name__}")
    return process


# From here on: what runs in the comparing process.


def _main() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    import logging

    import math_verify

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

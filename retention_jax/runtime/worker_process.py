"""A program in a process of its own, for work that cannot be trusted to end: it is killed when it takes too long.

The program is a file that imports nothing of this package. It writes "ready" once it is, and then one line to its
standard output for each line of its standard input; its memory it limits itself.
"""

import atexit
import os
import pathlib
import subprocess
import sys
import threading

START_LIMIT = 120.0  # seconds until the program must be ready


class Worker:
    """The process, started when first needed and ended with ours. One request at a time, from any thread."""

    def __init__(self, program: pathlib.Path, work: str) -> None:
        """`work` is what it does, in words, for messages: "renders chat templates"."""
        self._program, self._work = program, work
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: str, time_limit: float) -> str:
        """The program's answer to one line. Whatever is raised, the next request goes to a fresh process.

        Args:
          request: a line, without its end.
          time_limit: seconds, without those in which the process starts.

        Raises:
          TimeoutError: when there was no answer in time; the process is killed.
          ChildProcessError: when the process ended by itself, as it does out of memory, and was a fresh one: one that
            has answered before may have ended for what it kept of other requests, so a fresh one is asked.
          RuntimeError: when the program does not start within `START_LIMIT` seconds.
        """
        with self._lock:
            fresh = self._process is None
            answer = self._answer(request, time_limit)
            if answer is None and not fresh:
                answer = self._answer(request, time_limit)
        if answer is None:
            raise ChildProcessError(f"the process that {self._work} ended by itself")
        return answer

    def _answer(self, request: str, time_limit: float) -> str | None:
        """The answer, or None when the process ended before it was whole."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        expired = threading.Event()
        timer = threading.Timer(time_limit, lambda: (expired.set(), process.kill()))
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
        whole = answer.endswith("\n")
        if expired.is_set() or not whole:
            self._stop()
        if whole:
            return answer
        if expired.is_set():
            raise TimeoutError(f"the process that {self._work} took more than {time_limit:g} seconds")
        return None

    def close(self) -> None:
        """Ends the process, if there is one; the next request starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", self._program],  # -P: the program's folder must not shadow other packages
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the program that uses it
        )
        assert process.stdout
        timer = threading.Timer(START_LIMIT, process.kill)
        timer.start()
        ready = False
        try:
            ready = process.stdout.readline() == "ready\n"
        finally:
            timer.cancel()
            if not ready:
                process.kill()
                process.communicate()
        if not ready:
            raise RuntimeError(
                f"the process that {self._work} did not start within {START_LIMIT:g} seconds: "
                f"{sys.executable} {self._program}"
            )
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _forget(self) -> None:
        """In a forked process: the pipes belong to the parent."""
        self._lock, self._process = threading.Lock(), None

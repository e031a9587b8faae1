"""Jinja chat templates, rendered in a process of their own.

A template comes with a checkpoint and is not trusted. Jinja's sandbox keeps it away from Python; it cannot keep it from
looping for ever or from filling memory. So this file is also a program, which renders what its standard input asks for
under a memory limit, and which is killed when it takes too long. It imports nothing but the standard library and Jinja.
"""

import atexit
import datetime
import functools
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

TIME_LIMIT = 20.0  # seconds for one call of `render`
OUTPUT_LIMIT = 2**26  # characters of one text
_MEMORY_LIMIT = 2**31  # bytes of the rendering process, on Linux


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
    answer = json.loads(_client.ask(request, where))
    if "error" in answer:
        raise ValueError(f"{where}: chat template: {answer['error']}")
    return [Rendered(text, [(start, end) for start, end in spans]) for text, spans in answer["rendered"]]


class _Client:
    """The rendering process, started when first needed. One request at a time, from any thread."""

    def __init__(self) -> None:
        self.lock, self.process = threading.Lock(), None

    def ask(self, request: str, where: object) -> str:
        with self.lock:
            process = self.process = self.process or self._start()
            assert process.stdin and process.stdout
            expired = threading.Event()
            timer = threading.Timer(TIME_LIMIT, lambda: (expired.set(), process.kill()))
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
            if answer.endswith("\n"):
                if expired.is_set():
                    self._stop()
                return answer
            self._stop()
        why = f"took more than {TIME_LIMIT:g} seconds" if expired.is_set() else "ended its process, out of memory"
        raise ValueError(f"{where}: chat template {why}; does it loop for ever?")

    def _start(self) -> subprocess.Popen[str]:
        # -P: this file's folder must not shadow other packages.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the program that uses it
        )
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the process that renders chat templates did not start: {sys.executable} {__file__}")
        return process

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def close(self) -> None:
        with self.lock:
            self._stop()

    def forget(self) -> None:
        """In a forked process: the pipes belong to the parent."""
        self.__init__()


_client = _Client()
atexit.register(_client.close)
os.register_at_fork(after_in_child=_client.forget)


# From here on: what runs in the rendering process.


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_MARK}{caller()}{_MARK}"


_MARK = f"\ue000{secrets.token_hex(16)}\ue001"  # no text can hold it by chance, and no template knows it


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """The environment that chat templates are written for: the same names as in transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(source)


def _render(source: str, variables: dict[str, Any], limit: int) -> Rendered:
    pieces, size = [], 0
    for piece in _compile(source).generate(**variables):
        size += len(piece)
        if size > limit:
            raise jinja2.TemplateError(f"writes more than {limit} characters; does it loop for ever?")
        pieces.append(piece)
    outside = re.split(re.escape(_MARK), "".join(pieces))
    text, spans = "", []
    for i, part in enumerate(outside):
        if i % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return Rendered(text, spans)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"rendered": [_render(request["template"], job, request["limit"]) for job in request["jobs"]]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "out of memory; does it loop for ever?"}
    except Exception as error:  # whatever an expression in a template can raise
        return {"error": f"{type(error).__name__}: {error}"}


def _main() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    _main()

"""Renders Jinja chat templates: the program that `templates.py` starts and kills.

It imports nothing but the standard library and Jinja.
"""

import datetime
import functools
import json
import re
import secrets
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_MEMORY_LIMIT = 2**31  # bytes of this process, on Linux


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


def _render(source: str, variables: dict[str, Any], limit: int) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the [start, end) of what its `{% generation %}` blocks wrote."""
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
    return text, spans


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

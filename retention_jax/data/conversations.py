"""Rows of data files as conversations, or as plain text.

What a file holds is recognised from its columns, `LAYOUTS`. Beside those of a conversation, the columns `system`, a
text, and `tools`, JSON schemas of functions, are read. Other columns are not.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from retention_jax.data import sources
from retention_jax.text import chat
from retention_jax.text.chat import Message

_MOST_PROBLEMS = 10  # told at once

# ShareGPT's and others' names for who speaks. What is not listed here is a mistake in the data.
_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function": "tool"}


class Sample(NamedTuple):
    """One row. Empty content is a row whose fields are there and have nothing in them."""

    where: str  # "FILE, line 7", for messages
    content: list[Message] | str  # a conversation, or text
    tools: list[dict[str, Any]] | None = None  # that the assistant is told of


class Layout(NamedTuple):
    columns: tuple[str, ...]
    read: Callable[..., list[Message] | str]  # of the columns' values; raises ValueError


def read(paths: Sequence[pathlib.Path]) -> Iterator[Sample]:
    """The rows of the files, in order.

    Raises:
      ValueError: when rows are no JSON, fit no layout or another than their file's first, or a file has none: the first
        ten problems at once, by file and line or row. Nothing comes after the first problem.
    """
    problems: list[str] = []
    for path in paths:
        layout, rows = None, 0
        for place, row in sources.rows(path, _needed):
            rows += 1
            try:
                layout = layout or _layout(row)
                content, tools = _content(layout, row), None
                if isinstance(content, list) and content:
                    tools = chat.tools_of(_without_nones(row.get("tools")))
                    system = _text(row.get("system"))
                    content = chat.with_system(content, system) if system else content
            except ValueError as error:
                problems.append(f"{path}, {place}: {error}")
                if layout is None and not isinstance(row, ValueError):
                    break  # the other rows are alike
                if len(problems) == _MOST_PROBLEMS:
                    raise ValueError("\n".join([*problems, "and perhaps more"])) from None
                continue
            if not problems:
                yield Sample(f"{path}, {place}", content, tools)
        if not rows:
            problems.append(f"{path}: has no rows")
    if problems:
        raise ValueError("\n".join(problems))


# Layouts


def _text(value: Any) -> str:
    """ "" where there is none, or blanks alone."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"must be text, got {_shown(value)}")
    return value if value and value.strip() else ""


def _exchange(prompt: Any, answer: Any) -> list[Message]:
    """One question and its answer; empty when one of them is."""
    prompt, answer = _text(prompt), _text(answer)
    return [_user(prompt), _assistant(answer)] if prompt and answer else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _messages(turns: Any) -> list[Message]:
    return [_message(turn) for turn in _list(turns)]


def _message(turn: Any) -> Message:
    """role and content, or ShareGPT's from and value; other fields, such as thinking and tool calls, stay."""
    if not isinstance(turn, dict):
        raise ValueError(f"a message must be an object, got {_shown(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(_ROLES)}, got {_shown(role)}")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise ValueError(f"a message's content must be text, got {_shown(content)}")
    named = ("role", "from", "content", "value")
    others = {name: value for name, value in turn.items() if name not in named and value is not None}
    return {"role": _ROLES[role], "content": content or "", **others}


def _turns(texts: Any) -> list[Message]:
    """User and assistant in turn."""
    return [(_user, _assistant)[i % 2](_text(text)) for i, text in enumerate(_list(texts))]


def _instruction(instruction: Any, given: Any, output: Any) -> list[Message]:
    return _exchange("\n\n".join(filter(None, (_text(instruction), _text(given)))), output)


def _about(context: Any, question: Any, answer: Any) -> list[Message]:
    context, question = _text(context), _text(question)
    return _exchange(f"{context}\n\n{question}" if context and question else "", answer)


def _summary(text: Any, summary: Any) -> list[Message]:
    """A summary is text, or a list of several, each text or an object with it; the first counts."""
    if isinstance(summary, list):
        summary = next(iter(summary), None)
        summary = summary.get("text") if isinstance(summary, dict) else summary
    return _exchange(_text(text) and f"Summarize the following text.\n\n{text}", summary)


def _first(problem: Any, generations: Any) -> list[Message]:
    return _exchange(problem, next(iter(_list(generations)), None))


def _list(value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"must be a list, got {_shown(value)}")
    return value or []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# A file has the first layout whose columns it has. Well-known data sets of each:
LAYOUTS = (
    Layout(("messages",), _messages),  # OpenR1-Math-220k, ultrachat_200k, OpenAI's fine-tuning files
    Layout(("conversations",), _messages),  # ShareGPT, Synth-Long-SFT32K
    Layout(("data",), _turns),  # UltraChat
    Layout(("extended_context", "question", "answer"), _about),  # Buddhi
    Layout(("question", "answer"), _exchange),  # GSM8K
    Layout(("problem", "generations"), _first),  # OpenR1-Math without messages
    Layout(("problem", "solution"), _exchange),  # MATH
    Layout(("prompt", "response"), _exchange),
    Layout(("instruction", "input", "output"), _instruction),  # Alpaca
    Layout(("instruction", "output"), _exchange),  # LongAlpaca
    Layout(("text", "summary"), _summary),  # BookSum
    Layout(("text",), _text),
)


def _needed(columns: Sequence[str]) -> list[str] | None:
    """The columns to read out of a file that has these; all of them where they fit no layout."""
    layout = _fitting(columns)
    if layout is None:
        return None
    return [*layout.columns, *(name for name in ("system", "tools") if name in columns)]


def _without_nones(value: Any) -> Any:
    """Parquet gives every object the fields of all."""
    if isinstance(value, dict):
        return {name: _without_nones(item) for name, item in value.items() if item is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value


def _fitting(columns: Iterable[str]) -> Layout | None:
    return next((layout for layout in LAYOUTS if set(layout.columns) <= set(columns)), None)


def _layout(row: Any) -> Layout:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {_shown(row)}")
    if (layout := _fitting(row)) is None:
        known = "; ".join(" + ".join(layout.columns) for layout in LAYOUTS)
        raise ValueError(f"has {', '.join(row) or 'no columns'}; needed is one of: {known}")
    return layout


def _content(layout: Layout, row: Any) -> list[Message] | str:
    if isinstance(row, ValueError):
        raise row
    if missing := [name for name in layout.columns if not isinstance(row, dict) or name not in row]:
        raise ValueError(f"lacks {', '.join(missing)}, which the file's first row has")
    try:
        return layout.read(*(row[name] for name in layout.columns))
    except ValueError as error:
        raise ValueError(f"{', '.join(layout.columns)}: {error}") from None

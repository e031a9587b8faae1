"""What a client may ask: the fields of OpenAI's requests that this server honours, and how it refuses the others.

A field that would change the answer and is not honoured is refused by name. Fields that do not touch the answer are
let. Beside OpenAI's there are `top_k`, `min_p` and `chat_template_kwargs`, under the names that other servers use, and
`retention`, which is ours.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from retention_jax.serving.errors import ApiError, bad_request

MOST_SAMPLES = 128  # `n`
MOST_STOPS, LONGEST_STOP = 16, 256  # stop strings, and characters of one
MOST_LOGPROBS = 20
_SHOWN = 5  # problems that one message tells

# Taken and not looked at: they say who asks, or what to keep or bill, and not what to answer.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "parallel_tool_calls",
)
# Not honoured, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
    "web_search_options": (),
}
_REFUSED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"refusal": (), "annotations": ([],)} | dict.fromkeys(
    ("audio", "tool_calls", "function_call", "tool_call_id"), ([],)
)


def _problem(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", message)  # pyright: ignore[reportArgumentType]


def _content_of(content: Any) -> str | list[dict[str, Any]]:
    """A message's content as one text: itself, or its text parts, a line each. With pictures it stays a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _problem("must be a text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            _check_picture(part)
        elif kind != "text":
            named = f"{kind:.60} parts are" if isinstance(kind, str) else "a part without a type is"
            raise _problem(f"{named} not supported")
        elif not isinstance(part.get("text"), str) or not set(part) <= {"type", "text"}:
            raise _problem("a text part must have type and text, and nothing else")
    if any(part["type"] == "image_url" for part in content):
        return content
    return "\n".join(part["text"] for part in content)


def _check_picture(part: dict[str, Any]) -> None:
    """Of a part with a picture; `detail` asks for a size, which is the server's to choose."""
    inner = part.get("image_url")
    inner = inner if isinstance(inner, dict) and set(part) == {"type", "image_url"} else {}
    if not isinstance(url := inner.get("url"), str) or not set(inner) <= {"url", "detail"}:
        raise _problem("an image_url part must have type and image_url, an object with a url and perhaps detail")
    if inner.get("detail") not in (None, "auto", "low", "high"):
        raise _problem("the detail of a picture must be auto, low or high")
    if not re.match(r"data:image/[\w.+-]+;base64,", url):
        raise _problem("pictures are not fetched: the url must be a data URL, data:image/png;base64,...")


def _stops_of(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
        raise _problem(f"must be a text of 1 to {LONGEST_STOP} characters, or a list of them")
    if len(stops) > MOST_STOPS:
        raise _problem(f"must be at most {MOST_STOPS} texts")
    return stops


def _prompts_of(value: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list."""
    is_id = lambda x: isinstance(x, int) and not isinstance(x, bool)
    single = isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(is_id, value)))
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not prompts:
        raise _problem("must be a text, a list of token ids, or a list of those, and not empty")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(is_id, prompt))):
            raise _problem("must be a text, a list of token ids, or a list of those, and none of them empty")
    return prompts


class Model(BaseModel):
    """Types are as in JSON: no text for a number, no number for a truth value."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class RetentionOptions(Model):
    """Of this server: `reuse` lets the prompt begin from a snapshot; `show_kept` asks what is kept of each token."""

    reuse: bool = True
    show_kept: bool = False


class StreamOptions(Model):
    include_usage: bool = False
    include_obfuscation: bool = False


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[dict[str, Any]], BeforeValidator(_content_of)] = ""
    name: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """For the template, which knows `developer` by its older name."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role}


class Common(Model):
    """Fields of both endpoints."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_SAMPLES)
    stop: Annotated[list[str], BeforeValidator(_stops_of)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    retention: RetentionOptions = RetentionOptions()


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = {}


class CompletionRequest(Common):
    prompt: Annotated[list[Any], BeforeValidator(_prompts_of)]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False


Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """The request in a body.

    Raises:
      ApiError: 400, which tells the first few problems and names the field of the first.
    """
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("the body must be a JSON object")
    problems = [
        (name, "is not supported by this server") for name in REFUSED if name in given and _asks(given, name, REFUSED)
    ]
    kept = {name: v for name, v in given.items() if v is not None and name not in (*IGNORED, *REFUSED)}
    if isinstance(kept.get("messages"), list):
        kept["messages"], found = _without_empty_fields(kept["messages"])
        problems += found
    try:
        asked = kind.model_validate(kept)
    except ValidationError as error:
        problems += [(".".join(map(str, e["loc"])), _told(e)) for e in error.errors(include_url=False)]
        raise _refusal(problems) from None
    problems += _not_together(asked)
    if problems:
        raise _refusal(problems)
    return asked


def _asks(given: Mapping[str, Any], name: str, refused: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether a field has a value that asks for something; `true` is not the number 1."""
    value = given[name]
    return value is not None and (isinstance(value, bool) or value not in refused[name])


def _without_empty_fields(messages: list[Any]) -> tuple[list[Any], list[tuple[str, str]]]:
    """The messages without fields that are null or ask for nothing, as clients send them back; and problems."""
    kept, problems = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            kept.append(message)
            continue
        problems += [
            (f"messages.{i}.{name}", "is not supported by this server")
            for name in _REFUSED_IN_MESSAGE
            if name in message and _asks(message, name, _REFUSED_IN_MESSAGE)
        ]
        kept.append({k: v for k, v in message.items() if v is not None and k not in _REFUSED_IN_MESSAGE})
    return kept, problems


def _not_together(asked: ChatRequest | CompletionRequest) -> list[tuple[str, str]]:
    """Fields that are right alone and wrong beside others."""
    problems = []
    if asked.stream_options is not None and not asked.stream:
        problems.append(("stream_options", "is for stream=true only"))
    if isinstance(asked, ChatRequest):
        if asked.top_logprobs is not None and not asked.logprobs:
            problems.append(("top_logprobs", "needs logprobs=true"))
        limits = (asked.max_tokens, asked.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            problems.append(("max_tokens", f"and max_completion_tokens must be the same, got {limits[0]}, {limits[1]}"))
    elif asked.max_tokens == 0 and not asked.echo:
        problems.append(("max_tokens", "must be at least 1, unless echo=true asks for the prompt"))
    return problems


def _told(error: Any) -> str:
    message = {"missing": "is needed", "extra_forbidden": "is not a field of this request"}.get(error["type"])
    if message is not None:
        return message
    text = error["msg"].removeprefix("Input ").replace("List should", "must").replace("should be", "must be")
    value = error["input"]
    return f"{text}, got {value!r:.60}" if isinstance(value, str | int | float | bool) else text


def _refusal(problems: list[tuple[str, str]]) -> ApiError:
    told = [f"{name}: {text}" for name, text in problems[:_SHOWN]]
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return bad_request("; ".join(told) + more, problems[0][0])

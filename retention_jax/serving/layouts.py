"""Answers in the layouts of OpenAI's two endpoints."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from retention_jax.serving.replies import Token
from retention_jax.serving.token_text import TokenText


class Layout(NamedTuple):
    """How one endpoint writes a choice. Choices lack their index, finish_reason and `retention`, which both have."""

    prefix: str  # of an answer's id
    whole: str  # names of the objects
    chunk: str
    opening: dict[str, Any] | None  # the first chunk of a choice, where it has one without text
    choice: Callable[[str, Any], dict[str, Any]]  # of text and logprobs, all of them
    part: Callable[[str, Any], dict[str, Any]]  # of what is new of them
    logprobs: Callable[[TokenText, Sequence[Token]], dict[str, Any]]
    with_end: bool  # whether the token that ended the reply is listed, as scoring programs count on


def chat_logprobs(texts: TokenText, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.bytes(token))}

    content = [{**entry(t.id, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(texts: TokenText, tokens: Sequence[Token]) -> dict[str, Any]:
    """Beside the likeliest tokens, the chosen one is always among the top; a prompt's first token has no logprob."""
    found = []
    for t in tokens:
        top = {texts.text(token): logprob for token, logprob in reversed(t.top)}
        found.append(None if t.logprob is None else {**top, texts.text(t.id): t.logprob})
    return {
        "tokens": [texts.text(t.id) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": found,
        "text_offset": [t.start for t in tokens],
    }


CHAT = Layout(
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None},
    choice=lambda text, logprobs: {
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": logprobs,
    },
    part=lambda text, logprobs: {"delta": {"content": text} if text else {}, "logprobs": logprobs},
    logprobs=chat_logprobs,
    with_end=False,
)
COMPLETION = Layout(
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    opening=None,
    choice=lambda text, logprobs: {"text": text, "logprobs": logprobs},
    part=lambda text, logprobs: {"text": text, "logprobs": logprobs},
    logprobs=completion_logprobs,
    with_end=True,
)

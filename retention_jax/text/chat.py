"""Conversations as text and tokens, by a checkpoint's own chat template.

`render` is what a model is asked at inference. `encode_chat` is what gates are trained on: the same text, but with the
thinking of every turn in it, since that is what the cache holds while a model writes, and with a mask of what the
assistant wrote. `continuation` is what comes between two of its turns, for a buffer that goes on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from retention_jax.text import templates
from retention_jax.text.templates import Rendered
from retention_jax.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content, perhaps reasoning_content, tool_calls, ...

_REASONING = ("reasoning_content", "thinking", "reasoning")  # fields that data sets keep thoughts in
_INLINE = re.compile(r"\s*<think>\n*(.*?)\n*</think>\s*(.*)", re.DOTALL)
_PLACEHOLDER = "\ue000answer\ue001"  # private-use characters: in no answer and in no template


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the template writes it. Encode it with `bos=False`: it has its own special tokens.

    Args:
      tokenizer: holds the template.
      messages: the turns.
      add_generation_prompt: whether to end with what opens an assistant's turn.
      tools: JSON schemas of functions, for templates that know them.
      template_kwargs: further variables of the template, such as `enable_thinking`.

    Raises:
      ValueError: when there is no template, it fails (`templates.render` says how), or a message is none.
    """
    job = _Job(messages, add_generation_prompt)
    return _render(tokenizer, [job], tools, template_kwargs)[0].text


def continuation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    reply: int,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """What ends the assistant's turn `messages[reply]`, and what comes after that until the next assistant's turn.

    The second ends with what opens the next turn; the turns before do not matter. Raises ValueError like `render`, and
    when the template does not write a turn's end in the same way whether or not more turns follow.
    """
    bare = _with_placeholder(messages, reply)
    jobs = [_Job(bare[: reply + 1], False), _Job(bare, True)]
    last, followed = _render(tokenizer, jobs, tools, template_kwargs)
    closing, _ = _closing(tokenizer, _around_placeholder(tokenizer, last.text)[1])
    return closing, _after(tokenizer, followed.text, closing)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """A conversation for training: tokens, and which of them the assistant wrote.

    The assistant's are its thinking, its answer and the token that ends its turn. They are found by the template's
    `{% generation %}` blocks, if it has them and they keep all thinking; else each turn is what a rendering with it has
    more than the prompt for it. Either way thinking text stays in every turn, though many templates drop it from
    earlier ones, or from all: it is in the cache while the model writes on.

    Raises:
      ValueError: like `render`, and when turns cannot be told apart by what the template writes.
    """
    messages = [_plain(m) for m in messages]
    if any(re.search(r"{%[-+]?\s*generation\b", t) for t in tokenizer.chat_templates.values()):
        text, spans = _render(tokenizer, [_Job(messages, False)], tools, template_kwargs)[0]
        parts = [_thought_and_answer(m) for m in messages if m["role"] == "assistant"]
        generated, answers = "".join(text[a:b] for a, b in spans), "".join(answer for _, answer in parts)
        if all(_keeps(generated, thought, answers) for thought, _ in parts):
            return _encode_spans(tokenizer, text, spans)
    return _encode_spans(tokenizer, *_assemble(tokenizer, messages, tools, template_kwargs))


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The messages behind a system message; raises ValueError when they begin with another one."""
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise ValueError(f"has two system messages, {first.get('content')!r:.60} and {system!r:.60}")
    return [*messages]


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The `tools` of a row of data: a list of JSON schemas, or the text of one; None where there are none.

    Raises:
      ValueError: when it is anything else.
    """
    try:
        found = json.loads(value.strip() or "[]") if isinstance(value, str) else value or []
    except json.JSONDecodeError as error:
        raise ValueError(f"tools are not valid JSON: {error}") from None
    if not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise ValueError(f"tools must be a list of objects, got {value!r:.60}")
    return found or None


def reply_warnings(tokenizer: Tokenizer, *, templated: bool) -> list[str]:
    """What a checkpoint's folder says about replies and this package does not do, in words.

    Args:
      tokenizer: of the folder.
      templated: whether prompts go through the chat template. Then the token that the template writes after an
        assistant's turn should be a stop token: a model goes on for ever behind a turn's end that nobody stops at.
    """
    found = [
        f"generation_config.json has {name}={value!r}, which is not implemented: tokens are chosen without it"
        for name, value in tokenizer.generation.items()
        if name in _NOT_IMPLEMENTED and value not in (None, *_NOT_IMPLEMENTED[name])
    ]
    if templated and (end := _turn_end(tokenizer)) and tokenizer.backend.token_to_id(end) not in tokenizer.stop_tokens:
        stops = ", ".join(repr(tokenizer.backend.id_to_token(i)) for i in tokenizer.stop_tokens) or "no token"
        found.append(
            f"the chat template ends an assistant's turn with {end!r}, but {stops} ends a reply: replies may go on "
            f"behind their end; eos_token_id in generation_config.json can name both"
        )
    return [f"{tokenizer.where}: {text}" for text in found]


# Fields of generation_config.json that change which tokens are chosen, with their values that change nothing.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1, 1.0),
    "encoder_repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "top_h": (1, 1.0),
    "num_beams": (1,),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([], ""),
}


def _turn_end(tokenizer: Tokenizer) -> str:
    """The special token that the template writes after an assistant's answer; "" where it writes none."""
    messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _PLACEHOLDER}]
    try:
        [rendered] = _render(tokenizer, [_Job(messages, False)], None, None)
        closing, _ = _closing(tokenizer, _around_placeholder(tokenizer, rendered.text)[1])
    except ValueError:
        return ""  # the template wants other messages: prompts will show it
    return next((s for s in sorted(tokenizer.special_strings(), key=len, reverse=True) if closing.endswith(s)), "")


class _Job(NamedTuple):
    messages: Sequence[Message]
    add_generation_prompt: bool


def _render(
    tokenizer: Tokenizer,
    jobs: Sequence[_Job],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None,
) -> list[Rendered]:
    known = tokenizer.chat_templates
    name = "tool_use" if tools and "tool_use" in known else "default"
    if name not in known:
        raise ValueError(
            f"{tokenizer.where}: has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); a model without one continues plain text (--raw)"
        )
    if tools and not re.search(r"\btools\b", known[name]):
        raise ValueError(f"{tokenizer.where}: tools are given, but the chat template does not write any")
    own = ("messages", "tools", "documents", "add_generation_prompt")
    if clash := [name for name in own if name in (template_kwargs or {})]:
        raise ValueError(f"template_kwargs: {clash[0]!r} is an argument of its own")
    variables = [
        {
            **tokenizer.special_tokens,
            **(template_kwargs or {}),
            "messages": [_plain(m) for m in job.messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": job.add_generation_prompt,
        }
        for job in jobs
    ]
    return templates.render(known[name], variables, where=tokenizer.where)


def _plain(message: Message) -> dict[str, Any]:
    """The message with its thinking under the name that templates read, and without empty fields."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message must be an object with a role and content, got {message!r}")
    kept = {name: value for name, value in message.items() if value is not None}
    thought = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if thought is None else {**kept, "reasoning_content": thought}


def _assemble(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text turn by turn, and where the assistant's parts are in it."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        return _render(tokenizer, [_Job(messages, False)], tools, template_kwargs)[0].text, []
    jobs = []
    for turn, end in zip(turns, [*turns[1:], len(messages)], strict=True):
        alone = _with_placeholder(messages, turn)
        jobs += [
            _Job(messages[:turn], True),
            _Job(messages[: turn + 1], False),
            _Job(alone[: turn + 1], False),
            _Job(alone[:end], end < len(messages)),
        ]
    texts = [r.text for r in _render(tokenizer, jobs, tools, template_kwargs)]
    text, spans = texts[0], []
    for n, turn in enumerate(turns):
        prompt, full, alone, followed = texts[4 * n : 4 * n + 4]
        before, tail = _around_placeholder(tokenizer, alone)
        closing, rest = _closing(tokenizer, tail)
        opened, written = _written(tokenizer, messages[turn], turn, prompt, full, before, tail)
        if not written.endswith(rest):
            raise _inconsistent(tokenizer, f"turn {turn} does not end with {tail!r} as it does with another answer")
        text = text.removesuffix(opened)
        spans.append((len(text), len(text) + len(written) - len(rest)))
        text += written.removesuffix(rest) + _after(tokenizer, followed, closing)
    return text, spans


def _written(
    tokenizer: Tokenizer, message: dict[str, Any], turn: int, prompt: str, full: str, before: str, tail: str
) -> tuple[str, str]:
    """What the end of the prompt has too much for this turn, and the turn itself with everything to its end.

    Args:
      tokenizer: for messages.
      message: the assistant's.
      turn: its index.
      prompt: rendering of the messages before it, with what opens the assistant's turn.
      full: rendering with this message as the last one.
      before: what `full` has before the answer, where the message has no thinking.
      tail: what it has after the answer.
    """
    thought, answer = _thought_and_answer(message)
    if full.startswith(prompt) and _keeps(full[len(prompt) :], thought, answer):
        return "", full[len(prompt) :]
    opened = prompt[len(before) :]  # some templates begin the thinking for the model
    if not (prompt.startswith(before) and full.startswith(before) and opened.strip() in ("", "<think>")):
        raise _inconsistent(tokenizer, f"turn {turn} does not go on from the prompt, which ends with {prompt[-40:]!r}")
    if _keeps(full[len(before) :], thought, answer):
        return opened, full[len(before) :]
    if "tool_calls" in message:
        raise _inconsistent(tokenizer, f"turn {turn} has tool calls and thinking, which the template drops")
    return "", ("" if opened else "<think>\n") + f"{thought}\n</think>\n\n{answer}{tail}"


def _inconsistent(tokenizer: Tokenizer, what: str) -> ValueError:
    return ValueError(f"{tokenizer.where}: the chat template does not tell what the assistant wrote: {what}")


def _thought_and_answer(message: Message) -> tuple[str, str]:
    """Thinking and answer of an assistant's message, whether a field or the content holds the thinking."""
    content = message.get("content", "")
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    if "reasoning_content" in message:
        return message["reasoning_content"].strip("\n"), content
    inline = _INLINE.fullmatch(content)
    return (inline[1], inline[2]) if inline else ("", content)


def _keeps(text: str, thought: str, answer: str) -> bool:
    """Whether a text has the thinking beside the answer, which may hold the same words."""
    return not thought or text.count(thought) > answer.count(thought)


def _with_placeholder(messages: Sequence[Message], turn: int) -> list[Message]:
    """The messages, with a placeholder for one turn's answer and without its thinking."""
    bare = {name: value for name, value in messages[turn].items() if name not in _REASONING}
    return [*messages[:turn], {**bare, "content": _PLACEHOLDER}, *messages[turn + 1 :]]


def _around_placeholder(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    parts = text.split(_PLACEHOLDER)
    if len(parts) != 2:
        raise _inconsistent(tokenizer, f"it writes an answer {len(parts) - 1} times")
    return parts[0], parts[1]


def _closing(tokenizer: Tokenizer, tail: str) -> tuple[str, str]:
    """Cuts what follows an answer behind its first special token, which ends the turn; at the start without one."""
    ends = [at + len(s) for s in tokenizer.special_strings() if (at := tail.find(s)) >= 0]
    cut = min(ends, default=0)
    return tail[:cut], tail[cut:]


def _after(tokenizer: Tokenizer, text: str, closing: str) -> str:
    """What follows the placeholder and the end of its turn."""
    after = _around_placeholder(tokenizer, text)[1]
    if not after.startswith(closing):
        raise _inconsistent(tokenizer, f"a turn ends with {closing!r} if it is the last, else with {after[:40]!r}")
    return after[len(closing) :]


def _encode_spans(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """Tokens of a text, and which of them have a character of one of the spans."""
    encoded = tokenizer.encoding(text)
    offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
    # Some tokenizers trim spaces off their offsets: a token of spaces alone is then empty, at the spaces' end.
    start, end = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    mask = np.zeros(len(offsets), bool)
    for first, last in spans:
        mask |= (start < last) & (end > first)
    return np.asarray(encoded.ids, np.int32), mask

"""From a request as it was asked to requests of the engine: prompts as tokens, limits, how tokens are drawn."""

import secrets
from typing import NamedTuple

from retention_jax.generation import conversation
from retention_jax.serving import shown, uploads
from retention_jax.serving.errors import ApiError, bad_request
from retention_jax.serving.protocol import ChatRequest, CompletionRequest
from retention_jax.serving.requests import Request
from retention_jax.serving.service import Service
from retention_jax.serving.shown import Shown
from retention_jax.vision.prompt import assemble


class Prompt(NamedTuple):
    text: str
    tokens: tuple[int, ...]
    shown: Shown | None = None  # with pictures


class Plan(NamedTuple):
    """What one HTTP request asks of the engine."""

    asked: ChatRequest | CompletionRequest
    prompts: list[Prompt]
    requests: list[Request]  # asked.n for each prompt, one prompt after the other

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.asked.n]


def plan_chat(service: Service, asked: ChatRequest, arrived: float) -> Plan:
    """Renders and encodes a conversation; blocks as long as the template takes.

    Args:
      service: the model and its limits.
      asked: the request.
      arrived: when it came, in seconds of `time.monotonic`; its time runs from then on.

    Raises:
      ApiError: 400 and 413.
    """
    _check_count(service, asked, 1)
    kwargs = {**service.writer.template_kwargs, **asked.chat_template_kwargs}
    writer = service.writer._replace(template_kwargs=kwargs)
    vision, seen = writer.model.config.vision, None
    messages = uploads.opened([m.plain() for m in asked.messages], can_see=writer.processor is not None)
    try:
        text, media = conversation.prompt_text(writer, messages)
        if asked.retention.reuse:
            tokens = service.transcripts.tokens(text)
        else:
            tokens = writer.tokenizer.encode(text, bos=False)
        if vision is not None:
            whole = assemble(tokens, media, vision)  # which refuses placeholders that are no picture's
            seen = shown.of(whole, vision) if media else None
    except ValueError as error:
        raise bad_request(str(error), "messages") from error
    limit = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
    top = -1 if not asked.logprobs else asked.top_logprobs or 0
    return _plan(service, asked, [Prompt(text, tuple(tokens), seen)], limit, top, arrived, echo=False)


def plan_completion(service: Service, asked: CompletionRequest, arrived: float) -> Plan:
    """Encodes texts; blocks meanwhile. Arguments are as in `plan_chat`.

    Raises:
      ApiError: 400 and 413.
    """
    _check_count(service, asked, len(asked.prompt))
    tokenizer = service.writer.tokenizer
    prompts, vocabulary = [], service.writer.model.config.vocab_size
    for given in asked.prompt:
        if isinstance(given, str):
            try:
                conversation.check_control_tokens(service.writer, [given])
                prompts.append(Prompt(given, tuple(tokenizer.encode(given, bos=True))))
            except ValueError as error:
                raise bad_request(str(error), "prompt") from error
        else:
            if bad := [t for t in given if not 0 <= t < vocabulary]:
                raise bad_request(f"prompt: token {bad[0]} is outside [0, {vocabulary})", "prompt")
            known = [t for t in given if t < tokenizer.vocab_size]
            prompts.append(Prompt(tokenizer.decode(known) if asked.echo else "", tuple(given)))
    if (vision := service.writer.model.config.vision) is not None:
        marks = {vision.image_token, vision.video_token}
        if any(not marks.isdisjoint(prompt.tokens) for prompt in prompts):
            raise bad_request("prompt: a placeholder that stands for a picture cannot be text", "prompt")
    top = -1 if asked.logprobs is None else asked.logprobs
    return _plan(service, asked, prompts, asked.max_tokens, top, arrived, echo=asked.echo)


def _plan(
    service: Service,
    asked: ChatRequest | CompletionRequest,
    prompts: list[Prompt],
    limit: int | None,
    top_logprobs: int,
    arrived: float,
    echo: bool,
) -> Plan:
    writer = service.writer
    field = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if any(not prompt.tokens for prompt in prompts):
        raise bad_request(f"{field}: the prompt is empty", field)
    given = {name: getattr(asked, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    drawing = conversation.drawing_settings(writer.tokenizer.generation, given)
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    requests = [
        Request(
            prompt=prompt.tokens,
            shown=prompt.shown,
            max_new_tokens=_room(writer, prompt, limit, field),
            **drawing,
            seed=seed,
            row_id=sample,
            stop_tokens=writer.tokenizer.stop_tokens,
            top_logprobs=top_logprobs,
            prompt_logprobs=echo and top_logprobs >= 0,
            deadline=arrived + service.time_limit,
            reuse=asked.retention.reuse,
            show_kept=asked.retention.show_kept,
        )
        for prompt in prompts
        for sample in range(asked.n)
    ]
    return Plan(asked, prompts, requests)


def _check_count(service: Service, asked: ChatRequest | CompletionRequest, prompts: int) -> None:
    """Before any work is done for so many prompts."""
    if (count := prompts * asked.n) > service.most_sequences:
        field = "prompt" if prompts > service.most_sequences else "n"
        raise bad_request(f"{count} sequences in one request, at most {service.most_sequences}", field)


def _room(writer: conversation.Writer, prompt: Prompt, limit: int | None, field: str) -> int:
    """New tokens that a prompt may have; at least 1, which is thrown away where none was asked for."""
    context = writer.model.config.context
    room, code = context - len(prompt.tokens), "context_length_exceeded"
    if room < 1:
        told = f"{field}: {len(prompt.tokens)} tokens are too many: with a reply, the model reads {context}"
        raise ApiError(413, told, param=field, code=code)
    if limit is None:
        return min(writer.max_new_tokens, room)
    if limit > room:
        told = f"max_tokens: {limit} and the prompt's {len(prompt.tokens)} are more than the model's {context} tokens"
        raise ApiError(400, told, param="max_tokens", code=code)
    return max(limit, 1)

"""From the engine's pieces to answers, at once or in parts."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from retention_jax.cache import full_nbytes
from retention_jax.serving import json_text
from retention_jax.serving.asking import Plan
from retention_jax.serving.calls import Calls
from retention_jax.serving.errors import ApiError, unavailable
from retention_jax.serving.layouts import Layout
from retention_jax.serving.protocol import ChatRequest, CompletionRequest
from retention_jax.serving.replies import Delta, Reply, Token
from retention_jax.serving.service import Service

_FAILURES = {
    "deadline": ApiError(504, "the request took longer than the server lets one", code="time_limit"),
    "cancelled": unavailable("the server is ending"),
    "error": ApiError(500, "the model gave no finite logits, or the engine failed; the log says more", code="engine"),
}


class Answer:
    """All sequences of one HTTP request while they are written."""

    def __init__(self, service: Service, plan: Plan, layout: Layout, arrived: float) -> None:
        """`arrived` is the time.monotonic() of the request."""
        self._service, self._plan, self._layout = service, plan, layout
        self.head = {"id": layout.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": service.name}
        self._replies = [Reply(service.writer.tokenizer, plan.asked.stop) for _ in plan.requests]
        self._last = [arrived] * len(plan.requests)  # when each sequence's newest tokens came
        completion = plan.asked if isinstance(plan.asked, CompletionRequest) else None
        self._echo = completion is not None and completion.echo
        self._prompt_only = completion is not None and completion.max_tokens == 0
        self._told = [0] * len(plan.requests)  # tokens of each whose times were noted

    async def deltas(self, calls: Calls) -> AsyncIterator[tuple[int, Delta, bool]]:
        """Index, what is new, and whether it was the last, of all sequences as they come.

        Raises:
          ApiError: when a sequence has no whole reply: out of time, the server ends, the engine failed.
        """
        begun = set()
        async for index, piece in calls.pieces():
            reply = self._replies[index]
            delta = reply.take(piece)
            if piece.tokens:
                self._note_time(index, len(piece.tokens))
            if reply.ended and reply.finish in _FAILURES:
                raise _FAILURES[reply.finish]
            if reply.ended and not piece.finish:
                calls.cancel(index)
            if piece.finish:
                if reply.end is not None and self._layout.with_end:
                    delta = delta._replace(tokens=[*delta.tokens, reply.end])
                self._remember(index)
            if self._prompt_only:  # the token was made only because the engine makes at least one
                delta = Delta("", [])
            if self._echo:
                delta = self._behind_prompt(index, delta, first=index not in begun)
            begun.add(index)
            yield index, delta, bool(piece.finish)

    def _note_time(self, index: int, count: int) -> None:
        now, first = time.monotonic(), self._told[index] == 0
        self._service.metrics.tokens(count, now - self._last[index], first=first)
        self._last[index], self._told[index] = now, self._told[index] + count

    def _behind_prompt(self, index: int, delta: Delta, *, first: bool) -> Delta:
        """A part of a reply whose prompt stands before it, in the first part."""
        prompt, reply = self._plan.prompt_of(index), self._replies[index]
        new = [t._replace(start=t.start + len(prompt.text)) for t in delta.tokens]
        if not first:
            return delta._replace(tokens=new)
        shown = self._service.writer.tokenizer.stream()
        scores = [(None, []), *(reply.prompt or [(None, [])] * (len(prompt.tokens) - 1))]
        tokens, at = [], 0
        for token, (logprob, top) in zip(prompt.tokens, scores, strict=True):
            tokens.append(Token(token, logprob, top, at))
            at += len(shown([token]))
        return Delta(prompt.text + delta.text, [*tokens, *new])

    def _remember(self, index: int) -> None:
        """The conversation so far, for its next turn, when a chat's reply ended by itself."""
        reply, prompt, asked = self._replies[index], self._plan.prompt_of(index), self._plan.asked
        if not isinstance(asked, ChatRequest) or not asked.retention.reuse or reply.stopped_by_text:
            return
        tokenizer = self._service.writer.tokenizer
        end = "" if reply.end is None else tokenizer.backend.id_to_token(reply.end.id) or ""
        self._service.transcripts.remember(prompt.text + reply.text + end, (*prompt.tokens, *reply.written))

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """In the endpoint's layout, where they were asked for."""
        wanted = self._plan.requests[0].top_logprobs >= 0
        return self._layout.logprobs(self._service.token_text, delta.tokens) if wanted else None

    def ending(self, index: int) -> dict[str, Any]:
        """What a choice ends with."""
        reply, usage = self._replies[index], self._replies[index].usage
        assert usage is not None  # it comes with the last piece
        read = usage.prompt_tokens + usage.new_tokens - 1
        told: dict[str, Any] = {
            "kept": usage.kept,
            "budget_bytes": usage.budget_bytes,
            "full_bytes": full_nbytes(self._service.writer.model.config, read),
        }
        if reply.kept is not None:
            tokens = (*self._plan.prompt_of(index).tokens, *reply.all_tokens)[: len(reply.kept.by_token)]
            told |= {**reply.kept._asdict(), "tokens": [self._service.token_text.text(t) for t in tokens]}
        return {"finish_reason": reply.finish, "retention": told}

    def usage(self) -> dict[str, Any]:
        """Summed over sequences; a prompt counts once, however many replies it gets."""
        prompt = sum(len(p.tokens) for p in self._plan.prompts)
        new = 0 if self._prompt_only else sum(len(reply.written) for reply in self._replies)
        first = [reply.usage for reply in self._replies[:: self._plan.asked.n]]
        cached = sum(usage.cached_tokens for usage in first if usage is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def at_once(answer: Answer, plan: Plan, layout: Layout, calls: Calls) -> bytes:
    """The whole answer.

    Raises:
      ApiError: as `Answer.deltas` does.
    """
    deltas: list[list[Delta]] = [[] for _ in plan.requests]
    async for index, delta, _ in answer.deltas(calls):
        deltas[index].append(delta)
    choices = []
    for index, parts in enumerate(deltas):
        whole = Delta("".join(part.text for part in parts), [token for part in parts for token in part.tokens])
        choice = layout.choice(whole.text, answer.logprobs(whole))
        choices.append({"index": index, **choice, **answer.ending(index)})
    return json_text.dump({**answer.head, "object": layout.whole, "choices": choices, "usage": answer.usage()})


async def in_parts(answer: Answer, plan: Plan, layout: Layout, calls: Calls) -> AsyncIterator[bytes]:
    """The answer as server-sent events. An error after the beginning is an event too, and the last one."""
    options = plan.asked.stream_options
    with_usage = options is not None and options.include_usage

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if with_usage else {}
        value = {**answer.head, "object": layout.chunk, "choices": choices, **usage, **more}
        return b"data: " + json_text.dump(value) + b"\n\n"

    try:
        if layout.opening is not None:
            for index in range(len(plan.requests)):
                yield event([{"index": index, **layout.opening, "finish_reason": None}])
        async for index, delta, last in answer.deltas(calls):
            if delta.text or delta.tokens or last:
                ending = answer.ending(index) if last else {"finish_reason": None}
                yield event([{"index": index, **layout.part(delta.text, answer.logprobs(delta)), **ending}])
        if with_usage:
            yield event([], usage=answer.usage())
    except ApiError as error:
        yield b"data: " + json_text.dump(error.body()) + b"\n\n"
        return
    yield b"data: [DONE]\n\n"

"""An engine without a model, for tests of the HTTP layer: it writes the prompt again, over and over."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from retention_jax.serving import token_text
from retention_jax.serving.engine import Draining, Engine, QueueFull
from retention_jax.serving.metrics import Metrics
from retention_jax.serving.requests import EngineStats, Kept, Piece, Request, Usage
from retention_jax.serving.service import Service
from retention_jax.serving.transcripts import Transcripts


class FakeTicket(NamedTuple):
    number: int


class FakeEngine(Engine):
    """New token i is the prompt's token i, from its start again where it ends; its log-probability is -(i + 1) / 10.

    The likeliest others are the tokens after it. Tokens come `run` at a time. While `hold` is set, requests wait; they
    still can be cancelled. Each request has a thread, which calls back as the engine's thread does.
    """

    def __init__(self, *, queue: int = 8, run: int = 3, script: list[int] | None = None) -> None:
        self.row_bytes, self.queue, self.run, self.script = 4096, queue, run, script
        self.is_ready = True
        self.hold, self.slow = threading.Event(), 0.0
        self.requests: list[Request] = []
        self.running: dict[FakeTicket, threading.Event] = {}  # set where cancelled
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self.evil: Piece | None = None  # in place of what would come

    @property
    def ready(self) -> bool:
        return self.is_ready

    def submit(self, request: Request, on_piece: Callable[[Piece], None]) -> FakeTicket:
        if not self.is_ready:
            raise Draining("the engine drains")
        with self._lock:
            if len(self.running) >= self.queue:
                raise QueueFull(2.4)
            ticket = FakeTicket(next(self._numbers))
            self.running[ticket] = threading.Event()
            self.requests.append(request)
        threading.Thread(target=self._serve, args=(ticket, request, on_piece), daemon=True).start()
        return ticket

    def _serve(self, ticket: FakeTicket, request: Request, on_piece: Callable[[Piece], None]) -> None:
        cancelled = self.running[ticket]
        tokens, finish = self.written(request)
        give = lambda piece: on_piece(self.evil or piece)
        sent = 0
        while True:
            while self.hold.is_set() and not cancelled.is_set():
                time.sleep(0.005)
            cancelled.wait(self.slow)
            if cancelled.is_set():
                finish, new = "cancelled", []
            else:
                new = tokens[sent : sent + self.run]
            first, sent = sent == 0, sent + len(new)
            last = cancelled.is_set() or sent == len(tokens)
            if last:
                with self._lock:
                    del self.running[ticket]
            give(self._piece(request, new, sent, finish if last else "", first))
            if last:
                return

    def written(self, request: Request) -> tuple[list[int], str]:
        """All new tokens, and why there are no more."""
        source = self.script or request.prompt
        tokens = [source[i % len(source)] for i in range(request.max_new_tokens)]
        for i, token in enumerate(tokens):
            if token in request.stop_tokens:
                return tokens[: i + 1], "stop"
        return tokens, "length"

    def _piece(self, request: Request, new: list[int], sent: int, finish: str, first: bool) -> Piece:
        scored = request.top_logprobs >= 0
        top = lambda token, score: [(token + k, score - k) for k in range(max(request.top_logprobs, 0))]
        scores = [-(i + 1) / 10 for i in range(sent - len(new), sent)]
        prompt = None
        if request.prompt_logprobs and first and new:
            prompt = [(-float(i), top(token, -float(i))) for i, token in enumerate(request.prompt) if i]
        usage = Usage(len(request.prompt), 2, sent, 7, self.row_bytes) if finish else None
        kept = None
        if request.show_kept and finish in ("stop", "length"):
            kept = Kept([[3, 4], [5, 6]], [1] * (len(request.prompt) + sent - 1))
        tops = [top(*pair) for pair in zip(new, scores, strict=True)] if request.top_logprobs > 0 else []
        return Piece(new, scores if scored else [], tops, finish, usage, prompt, kept)  # pyright: ignore

    def cancel(self, ticket: FakeTicket) -> None:
        if ticket in self.running:
            self.running[ticket].set()

    def stats(self) -> EngineStats:
        return EngineStats(4, len(self.running), 0, len(self.requests), 30, 2, 9, 5, 1.5, None)

    def drain(self, timeout: float) -> None:
        self.is_ready = False
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        for cancelled in list(self.running.values()):
            cancelled.set()


def make_service(writer, engine, **changes: Any) -> Service:
    service = Service(
        engine=engine,
        writer=writer,
        name="tiny",
        most_sequences=8,
        time_limit=30.0,
        keys=None,
        transcripts=Transcripts(writer.tokenizer),
        token_text=token_text.of(writer.tokenizer),
        metrics=Metrics(engine.stats),
        created=1,
        draining=threading.Event(),
    )
    return service._replace(**changes)

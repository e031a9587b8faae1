"""Many requests over rows of one buffer: each is read in, decoded beside the others, and makes room for the next.

One thread owns the device. It reads one chunk of the prompt that is to come in next, decodes a short run of tokens for
all rows, and so on; so a long prompt makes the others wait for no more than a chunk. Shapes never change and rows never
see each other: what a request is answered does not depend on what else is served. Two things it does depend on: the
number of rows, as far as another shape rounds differently, and, where it may use snapshots, whether it continues an
earlier answer word for word (`sessions.py`).
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import jax
from absl import logging

from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding
from retention_jax.serving import requests, shown
from retention_jax.serving.programs import Made
from retention_jax.serving.requests import EngineStats, Finish, Piece, Request, Ticket, Usage
from retention_jax.serving.rows import Rows
from retention_jax.serving.sessions import Held, Sessions
from retention_jax.serving.shown import View

_RATE_SECONDS = 10.0
_LOOK_AGAIN = 0.05  # seconds; deadlines pass while a file is read


class QueueFull(RuntimeError):
    """No more requests may wait."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after  # seconds until, going by earlier requests, there is a place


class Draining(RuntimeError):
    """The engine takes no requests: it has not started, is coming to its end, or has failed."""


class _Finding(NamedTuple):
    """A request whose snapshot, if there is one, is looked for."""

    ticket: Ticket
    held: "Future[Held | None]"


class _Reading(NamedTuple):
    """A prompt that is being read."""

    ticket: Ticket
    row: int  # where it goes
    at: int  # tokens read
    buffer: Buffer
    keep_at: set[int]  # after how many tokens a snapshot is kept
    view: View | None  # its pictures

    @property
    def looks(self) -> bool:
        """Whether a picture comes next."""
        return self.view is not None and not self.view.is_whole


class Engine:
    """Serves requests over rows; `submit`, `cancel`, `stats` and `drain` may be called from any thread."""

    def __init__(
        self,
        model: Decoder,
        cache: CacheConfig,
        *,
        rows: int,
        queue: int,
        sessions: Sessions | None,
        run: int = 8,
        picture: int = 0,
    ) -> None:
        """Makes the buffer.

        Args:
          model: the decoder.
          cache: what each row keeps; its `prefill_chunk` is what of a prompt is read between two runs.
          rows: requests that are decoded at a time.
          queue: requests that may wait beside them.
          sessions: snapshots of the same model and configuration; None: there are none. They end with the engine.
          run: tokens a row of one run.
          picture: the most features of a picture; 0: requests have none.

        Raises:
          ValueError: where a number is too small, or chunks, model or policy cannot be served (all listed).
        """
        numbers = {"rows": rows, "queue": queue, "run": run}
        problems = [f"{name} must be at least 1, got {value}" for name, value in numbers.items() if value < 1]
        if cache.prefill_chunk is None:
            problems.append("prefill_chunk must say how much of a prompt is read at a time, got None")
        if cache.row.needs_future:
            problems.append(f"policy {cache.policy!r} needs to know the future, and cannot be served")
        if (parts := sharding.row_parts(model)) > 1:
            problems.append(f"prompts are read one by one: mesh data * fsdp must be 1, got {parts}")
        if jax.process_count() > 1:
            problems.append(f"an engine runs on one process, got {jax.process_count()}")
        if problems:
            raise ValueError("engine: " + "; ".join(problems))
        self._model, self._queue_limit, self._sessions, self._picture = model, queue, sessions, picture
        self._heads = model.config.num_layers * model.config.num_kv_heads
        with sharding.enter_mesh_of(model):
            self._rows = Rows(model, cache, rows, run, picture)
        self.row_bytes = self._rows.nbytes  # of a row, whatever its context
        self._tickets: list[Ticket | None] = [None] * rows
        self._reading: _Reading | None = None
        self._finding: _Finding | None = None
        # The rest is shared between threads, under the lock.
        self._lock = threading.Condition()
        self._queue: deque[Ticket] = deque()
        self._state = "new"  # then serving, draining, ended
        self._drained_by = 0.0  # when draining ends, in seconds of `time.monotonic`
        self._in_use = 0
        self._accepted = 0  # requests, of which `_totals` counts those that have ended
        self._totals: dict[str, int] = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "new_tokens", "evicted_entries"), 0
        )
        self._rate: deque[tuple[float, int]] = deque()
        self._seconds = 1.0  # that a request takes, from its row's to its end, on average over the last ones
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        """Compiles every program, and then serves. Raises what compiling raises, such as too little memory."""
        with sharding.enter_mesh_of(self._model):
            self._rows.warm_up()
        with self._lock:
            if self._state == "new":  # it may have been drained meanwhile
                self._state = "serving"
                self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._state == "serving"

    def submit(self, request: Request, on_piece: Callable[[Piece], None]) -> Ticket:
        """Takes a request in, or refuses it; never waits.

        Args:
          request: what is asked.
          on_piece: called on the engine's thread with each piece, the last one with a `finish`. It must only hand over.
            What it raises cancels the request.

        Raises:
          ValueError: naming all that is wrong with the request.
          QueueFull: when too many wait.
          Draining: when none are taken any more.
        """
        problems = requests.problems(request, self._model.config)
        if request.shown is not None:
            problems += shown.problems(request.shown, self._model.config, self._picture)
        if problems:
            raise ValueError("; ".join(problems))
        ticket = Ticket(request, on_piece)
        with self._lock:
            if not self.ready:
                raise Draining(f"the engine takes no requests: it is {self._state}")
            if self._accepted - self._totals["requests"] >= len(self._tickets) + self._queue_limit:
                raise QueueFull(max(1.0, self._seconds * (len(self._queue) + 1) / len(self._tickets)))
            self._accepted += 1
            self._queue.append(ticket)
            self._lock.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request; its last piece says so, unless it has ended. Its row is free after at most one run."""
        with self._lock:
            ticket.cancelled = True
            self._lock.notify()

    def stats(self) -> EngineStats:
        snapshots = None if self._sessions is None else self._sessions.stats()
        with self._lock:
            since = time.monotonic() - _RATE_SECONDS
            recent = sum(count for at, count in self._rate if at > since)
            rows = dict(rows=len(self._tickets), rows_in_use=self._in_use, queued=len(self._queue))
            return EngineStats(**rows, **self._totals, tokens_per_second=recent / _RATE_SECONDS, snapshots=snapshots)

    def drain(self, timeout: float) -> None:
        """Takes no more requests, finishes those that were taken, parks all snapshots, and ends the thread.

        What has not ended after `timeout` seconds is cancelled.
        """
        with self._lock:
            before = self._state
            if before in ("new", "serving"):
                self._state, self._drained_by = "draining", time.monotonic() + timeout
            self._lock.notify()
        if before == "new":
            self._state = "ended"
        elif self._thread.is_alive():
            self._thread.join()
        if self._sessions is not None:
            self._sessions.close()

    def _serve(self) -> None:
        """The engine's thread."""
        finish: Finish = "cancelled"
        try:
            with sharding.enter_mesh_of(self._model):
                while self._turn():
                    pass
        except Exception:  # whatever it is, nobody may be left waiting
            logging.exception("the engine failed; it takes no more requests")
            finish = "error"
        with self._lock:
            self._state = "ended"
            left = [*self._taken(), *self._queue]
            self._queue.clear()
            self._in_use = 0
        for ticket in left:
            self._end(ticket, finish)

    def _taken(self) -> list[Ticket]:
        """Requests that wait no longer."""
        coming = [x.ticket for x in (self._finding, self._reading) if x is not None]
        return [*coming, *(ticket for ticket in self._tickets if ticket is not None)]

    def _turn(self) -> bool:
        """Reads one chunk and decodes one run; whether there is more to come."""
        with self._lock:
            while not self._queue and not self._taken():
                if self._state == "draining":
                    return False
                self._lock.wait()
            if self._finding is not None and len(self._taken()) == 1 and not self._finding.held.done():
                self._lock.wait(_LOOK_AGAIN)  # for the file; there is nothing else to do
            if self._state == "draining" and time.monotonic() > self._drained_by:
                return False
        self._end_what_is_over()
        share = self._rows.chunk  # a whole chunk, a picture, or up to four short prompts
        while share > 0:
            self._admit()
            if self._reading is None:
                break
            left = len(self._reading.ticket.request.prompt) - self._reading.at
            share -= share if self._reading.looks else max(left, -(-self._rows.chunk // 4))
            self._reading = self._read_on(self._reading)
        if not self._rows.idle:
            made = self._rows.decode()
            for row, ticket in enumerate(self._tickets):
                if ticket is not None and self._give(ticket, made, row, functools.partial(self._rows.take, row)):
                    self._free(row)
        with self._lock:
            self._in_use = len(self._taken())
        return True

    def _end_what_is_over(self) -> None:
        """Ends requests that were cancelled, or whose time is up."""
        now = time.monotonic()

        def reason(ticket: Ticket) -> Finish:
            deadline = ticket.request.deadline
            return "cancelled" if ticket.cancelled else "deadline" if deadline is not None and now > deadline else ""

        with self._lock:
            over = [ticket for ticket in self._queue if reason(ticket)]
            for ticket in over:
                self._queue.remove(ticket)
        if self._finding is not None and reason(self._finding.ticket):
            over, self._finding = [*over, self._finding.ticket], None
        if self._reading is not None and reason(self._reading.ticket):
            over, self._reading = [*over, self._reading.ticket], None
        for row, ticket in enumerate(self._tickets):
            if ticket is not None and reason(ticket):
                over.append(ticket)
                self._free(row)
        for ticket in over:
            self._end(ticket, reason(ticket))

    def _free(self, row: int) -> None:
        self._tickets[row] = None
        self._rows.clear(row)

    def _admit(self) -> None:
        """Begins to read the next prompt, if there is one, a row for it, and what of it a file may hold."""
        if self._reading is None and self._finding is None and None in self._tickets:
            with self._lock:
                ticket = self._queue.popleft() if self._queue else None
            if ticket is not None:
                ticket.admitted = time.monotonic()
                self._finding = _Finding(ticket, self._find(ticket.request))
        if self._finding is None or not self._finding.held.done():
            return
        ticket, held = self._finding.ticket, self._finding.held.result()
        self._finding = None
        one, keep_at = self._rows.fresh() if held is None else self._rows.on_device(held.buffer), set()
        request, base = ticket.request, 0
        if held is not None:
            ticket.cached = held.length
            ticket.evicted_before = self._heads * held.length - int(held.buffer.live[0])
            base = 0 if held.buffer.shift is None else int(held.buffer.shift[0])
        if self._sessions is not None and request.reuse:
            keep_at = self._sessions.worth_keeping(request.key, ticket.cached, self._rows.chunk)
        view = None if request.shown is None else shown.begin(request.shown, ticket.cached, base)
        self._reading = _Reading(ticket, self._tickets.index(None), ticket.cached, one, keep_at, view)

    def _find(self, request: Request) -> "Future[Held | None]":
        if self._sessions is None or not request.reuse or request.prompt_logprobs:
            nothing: Future[Held | None] = Future()
            nothing.set_result(None)
            return nothing
        found = self._sessions.find(request.key)
        found.add_done_callback(self._wake)
        return found

    def _wake(self, _: object) -> None:
        with self._lock:
            self._lock.notify()

    def _read_on(self, reading: _Reading) -> _Reading | None:
        """Looks at a picture, or reads a chunk.

        Once the prompt is whole it goes into its row, with its first token, and None is returned.
        """
        ticket, request, view = reading.ticket, reading.ticket.request, reading.view
        if view is not None and reading.looks:
            return reading._replace(view=self._rows.look(view))
        part = self._rows.read(reading.buffer, request.prompt, reading.at, wanted=request.prompt_logprobs, view=view)
        if request.prompt_logprobs:
            known = part.count - (part.at == len(request.prompt))  # of the last token's next one nothing is asked
            ticket.prompt += requests.listed(jax.device_get(part.log_probs), known, request.top_logprobs)
        if self._sessions is not None and part.at in reading.keep_at:
            self._sessions.keep_prompt(request.key, part.at, self._rows.on_host(part.buffer))
        if part.at < len(request.prompt):
            return reading._replace(at=part.at, buffer=part.buffer)
        made = self._rows.begin(part, request)
        if not self._give(ticket, made, 0, lambda: self._rows.on_host(part.buffer)):
            self._rows.put(reading.row, part.buffer, request, made)
            self._tickets[reading.row] = ticket
        return None

    def _give(self, ticket: Ticket, made: Made, row: int, take: Callable[[], Buffer]) -> bool:
        """Hands over what a row has made; whether that was the last of it. `take` makes a snapshot of the row."""
        request, count = ticket.request, int(made.count[row])
        tokens = made.tokens[row, :count].tolist()
        finish = requests.finish_of(request, bool(made.standing.done[row]), tokens[-1])
        if finish == "error":
            logging.error("logits are not finite: the weights hold NaN or infinity, or their dtype overflows")
            tokens.pop()
        told, top = [], request.top_logprobs
        if top >= 0:
            told = requests.listed(jax.tree.map(lambda a: a[row], made.log_probs), len(tokens), top)
        piece = Piece(tokens, [chosen for chosen, _ in told], [pairs for _, pairs in told if top > 0])
        if request.prompt_logprobs and not ticket.new:
            piece = piece._replace(prompt=ticket.prompt)
        ticket.new += tokens
        ticket.live = int(made.live[row])
        with self._lock:
            self._rate.append((time.monotonic(), len(tokens)))
            while self._rate[0][0] < self._rate[-1][0] - _RATE_SECONDS:
                self._rate.popleft()
        if not finish:
            self._call(ticket, piece)
            return False
        keep = self._sessions is not None and request.reuse
        if finish != "error" and (keep or request.show_kept):
            one = take()
            if self._sessions is not None and keep:
                self._sessions.keep_answer([*request.key, *ticket.new[:-1]], one)
            piece = piece._replace(kept=requests.kept_of(one) if request.show_kept else None)
        self._end(ticket, finish, piece)
        return True

    def _end(self, ticket: Ticket, finish: Finish, piece: Piece | None = None) -> None:
        """Counts a request that is over, and hands its last piece over."""
        prompt, new = len(ticket.request.prompt), len(ticket.new)
        usage = Usage(prompt, ticket.cached, new, ticket.live, self.row_bytes)
        evicted = self._heads * (prompt + new - 1) - ticket.live - ticket.evicted_before if new else 0
        with self._lock:
            for name, count in (
                ("requests", 1),
                ("prompt_tokens", prompt),
                ("cached_tokens", ticket.cached),
                ("new_tokens", new),
                ("evicted_entries", evicted),
            ):
                self._totals[name] += count
            if ticket.admitted is not None:
                self._seconds += 0.1 * (time.monotonic() - ticket.admitted - self._seconds)
        self._call(ticket, (piece or Piece([], [], []))._replace(finish=finish, usage=usage))

    def _call(self, ticket: Ticket, piece: Piece) -> None:
        try:
            ticket.on_piece(piece)
        except Exception:
            logging.exception("a piece of an answer could not be handed over; its request is cancelled")
            ticket.cancelled = True

"""Connections that cost a server more than their client: too many, idle for ever, or with an answer that nobody reads.

uvicorn ends a connection that was answered and then says nothing. It waits for ever for the rest of a head, for a body
that it no longer wants, and for a client that does not read.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from retention_jax.serving import json_text
from retention_jax.serving.errors import unavailable

HEAD_SECONDS = 30.0  # until the whole head of the next request is there, from the connection's or the last answer's end
STALL_SECONDS = 60.0  # that what is written may wait for the client to read


class Connection(H11Protocol):
    """One client's connection; those above `most` are told so and closed."""

    def __init__(self, *, most: int, **of_server: Any) -> None:
        super().__init__(**of_server)
        self._most = most
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.write(_refusal())
            transport.close()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._head is not None:  # a request has begun
            self._head.cancel()

    def on_response_complete(self) -> None:
        self._await_head()  # first: the next request may be there already
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def _await_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        # Not `close`, which would wait for an answer to be read.
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


def _refusal() -> bytes:
    body = json_text.dump(unavailable("too many connections").body())
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

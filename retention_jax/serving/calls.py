"""The engine's requests of one HTTP request, and their pieces in the event loop.

The engine calls back on a thread of its own; what it hands over waits in a queue of the event loop, so a client that
reads slowly keeps nobody waiting.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from retention_jax.serving.engine import Engine
from retention_jax.serving.requests import Piece, Request


class Calls:
    """Requests that run; `cancel` frees their rows."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Submits all of them, or none.

        Raises:
          QueueFull, Draining, ValueError: as `Engine.submit` does.
        """
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: dict[int, Any] = {}  # of those that have not ended
        try:
            for index, request in enumerate(requests):
                self._tickets[index] = engine.submit(request, self._taker(index))
        except BaseException:
            self.cancel()
            raise

    def _taker(self, index: int):
        def take(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return take

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every request's pieces as they come, with the request's index, until all have ended."""
        while self._tickets:
            index, piece = await self._pieces.get()
            if piece.finish:
                del self._tickets[index]
            yield index, piece

    def cancel(self, index: int | None = None) -> None:
        """Ends one request, or all, if they have not ended. Their last pieces still come."""
        for i in list(self._tickets) if index is None else [index]:
            if i in self._tickets:
                self._engine.cancel(self._tickets[i])

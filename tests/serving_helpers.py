"""Clients of an engine, and what they would be answered alone."""

import queue
import time
from typing import Any

from helpers import tokens_of

import retention_jax as rj
from retention_jax.serving.engine import Engine
from retention_jax.serving.requests import EngineStats, Piece, Request

CACHE = rj.CacheConfig(budget=4, recent=6, prefill_chunk=8)
HEADS = 4


class Client:
    """Collects the pieces of an answer."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request, self.pieces, self._queue = request, [], queue.Queue()
        self.ticket = engine.submit(request, self._queue.put)

    def next(self) -> Piece:
        self.pieces.append(self._queue.get(timeout=60))
        return self.pieces[-1]

    def all(self) -> "Client":
        while not self.next().finish:
            pass
        assert self._queue.empty()
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def last(self) -> Piece:
        return self.pieces[-1]


def request_of(number: int, length: int, new: int, **how: Any) -> Request:
    return Request(tuple(tokens_of(number, length).tolist()), new, **how)


def alone(model, request: Request, buffer=None) -> list[int]:
    how = {name: getattr(request, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    prompts, ids = [request.prompt], [request.row_id]
    stops, new = request.stop_tokens, request.max_new_tokens
    out = rj.generate(model, prompts, CACHE, max_new_tokens=new, stop_tokens=stops, row_ids=ids, buffer=buffer, **how)
    return out.tokens[0]


def settled(engine: Engine) -> EngineStats:
    """Once every row is free."""
    by = time.monotonic() + 60
    while (stats := engine.stats()).rows_in_use or stats.queued:
        assert time.monotonic() < by
        time.sleep(0.01)
    return stats

"""What a server's engine is asked, what it answers, piece by piece, and what it tells of itself."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from retention_jax.cache.buffer import Buffer
from retention_jax.config import ModelConfig
from retention_jax.generation import sampling
from retention_jax.generation.sampling import LogProbs
from retention_jax.serving.programs import MOST_STOPS, NO_TOKEN, Settings
from retention_jax.serving.sessions import SessionStats
from retention_jax.serving.shown import Shown

MOST_LOGPROBS = sampling.MOST_LIKELIEST
Finish = Literal["", "stop", "length", "cancelled", "deadline", "error"]
TokenLogProbs = tuple[float, list[tuple[int, float]]]  # of a token, and of the likeliest ones at its place


class Request(NamedTuple):
    """A prompt to continue. Sampling is as in `generate`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    row_id: int = 0  # samples of one prompt with one seed differ by it
    stop_tokens: tuple[int, ...] = ()
    top_logprobs: int = -1  # -1: no log-probabilities; else of each token, and of so many of the likeliest
    prompt_logprobs: bool = False  # of the prompt's tokens too, all but the first; then no snapshot is taken up
    deadline: float | None = None  # in seconds of `time.monotonic`
    reuse: bool = True  # whether snapshots are taken up and left behind
    show_kept: bool = False  # whether the last piece tells what is kept of each token
    shown: Shown | None = None  # the prompt with its pictures, if it has any

    @property
    def key(self) -> tuple[int, ...]:
        """What snapshots know the prompt by, a number a token."""
        return self.prompt if self.shown is None else self.shown.key


class Usage(NamedTuple):
    """What a request took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, that a snapshot held
    new_tokens: int  # a stop token counts
    kept: int  # entries of its row at the end, all layers and heads
    budget_bytes: int  # of a row


class Kept(NamedTuple):
    """What is left at the end of a request."""

    by_head: list[list[int]]  # entries of each layer and key/value head
    by_token: list[int]  # of each token that was read: how many of all heads of all layers keep it


class Piece(NamedTuple):
    """The next part of an answer. Lists over its tokens are empty where they were not asked for."""

    tokens: list[int]  # a stop token is the last of them
    logprobs: list[float]  # natural, of the model's own distribution
    top: list[list[tuple[int, float]]]
    finish: Finish = ""  # "": more follow
    usage: Usage | None = None  # with the last piece
    prompt: list[TokenLogProbs] | None = None  # with the first token, where asked for
    kept: Kept | None = None  # with the last piece, where asked for and the answer ended by itself or its limit


class Ticket:
    """A request on its way; the engine's alone, but for being handed to `cancel`."""

    def __init__(self, request: Request, on_piece: Callable[[Piece], None]) -> None:
        self.request, self.on_piece = request, on_piece
        self.cancelled = False
        self.admitted: float | None = None  # when it waited no longer, in seconds of `time.monotonic`
        self.new: list[int] = []
        self.live = 0  # entries of its row, when last told
        self.cached = 0  # tokens of the prompt that a snapshot held
        self.evicted_before = 0  # entries that the snapshot had lost
        self.prompt: list[TokenLogProbs] = []


class EngineStats(NamedTuple):
    """What is going on, and totals of all requests that have ended."""

    rows: int
    rows_in_use: int  # the one whose prompt is read counts
    queued: int
    requests: int
    prompt_tokens: int  # with those that snapshots held
    cached_tokens: int
    new_tokens: int
    evicted_entries: int
    tokens_per_second: float  # new ones, over the last 10 seconds
    snapshots: SessionStats | None


def problems(request: Request, model: ModelConfig) -> list[str]:
    """What is wrong with a request, in words."""
    V = model.vocab_size
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    given = {name: getattr(request, name) for name in names} | {"row_ids": request.row_id}
    _, found = sampling.over_rows(1, **given)
    found = [problem.replace(" for row 0", "") for problem in found]
    if not request.prompt:
        found.append("the prompt is empty")
    if bad := [t for t in request.prompt if not 0 <= t < V]:
        found.append(f"the prompt has token {bad[0]}, outside [0, {V})")
    if bad := [t for t in request.stop_tokens if not 0 <= t < 2**31]:
        found.append(f"stop_tokens must be in [0, 2**31), got {', '.join(map(str, bad))}")
    if len(request.stop_tokens) > MOST_STOPS:
        found.append(f"stop_tokens must be at most {MOST_STOPS}, got {len(request.stop_tokens)}")
    if not -1 <= request.top_logprobs <= MOST_LOGPROBS:
        found.append(f"top_logprobs must be from -1 to {MOST_LOGPROBS}, got {request.top_logprobs}")
    return found


def write_settings(settings: Settings, row: int, request: Request) -> None:
    """Puts what a request asks for into its row."""
    for name in ("temperature", "top_k", "top_p", "min_p", "row_id", "max_new_tokens"):
        getattr(settings, name)[row] = getattr(request, name)
    settings.seed[row] = np.asarray(request.seed, np.int64).astype(np.int32)  # its lowest 32 bits, as `settings` takes
    settings.stop_tokens[row] = NO_TOKEN
    settings.stop_tokens[row, : len(request.stop_tokens)] = request.stop_tokens
    settings.wanted[row] = request.top_logprobs >= 0


def finish_of(request: Request, done: bool, last: int) -> Finish:
    """How a row ended, by its last token."""
    if not done:
        return ""
    if last == sampling.NOT_FINITE:
        return "error"
    return "stop" if last in request.stop_tokens else "length"


def listed(found: LogProbs, count: int, top: int) -> list[TokenLogProbs]:
    """Of the first `count` tokens of one row, [tokens], on the host."""
    top = max(top, 0)
    pairs = lambda tokens, values: list(zip(tokens[:top].tolist(), values[:top].tolist(), strict=True))
    each = zip(found.chosen[:count].tolist(), found.tokens[:count], found.likeliest[:count], strict=True)
    return [(chosen, pairs(tokens, values)) for chosen, tokens, values in each]


def kept_of(one: Buffer) -> Kept:
    """What is in a row, which is a buffer of batch 1."""
    positions = one.positions(0)
    seen = int(np.asarray(one.seen)[0])
    flat: Sequence[np.ndarray] = [head for layer in positions for head in layer]
    by_token = np.bincount(np.concatenate(flat), minlength=seen)
    return Kept([[len(head) for head in layer] for layer in positions], by_token.tolist())

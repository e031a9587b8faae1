"""The rows of an engine on the device, and what each one's request asks for. For one thread."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from retention_jax.cache import empty, insert_row, reset_row, shapes, snapshot, take_row
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig, ModelConfig
from retention_jax.generation.sampling import LogProbs
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Visual, padded
from retention_jax.serving import programs, requests, shown
from retention_jax.serving.programs import Made
from retention_jax.serving.requests import Request
from retention_jax.serving.shown import View


class Part(NamedTuple):
    """What reading a part of a prompt gave."""

    at: int  # tokens of the prompt read by now
    hidden: jax.Array  # of the last of them
    buffer: Buffer
    log_probs: LogProbs  # on the device
    count: int  # tokens of the part


def row_nbytes(model: ModelConfig, cache: CacheConfig) -> int:
    """Bytes of a row, whatever its context."""
    one = shapes(model, cache, 1)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((one.pool, one.recent, one.queries)))


class Rows:
    """Rows of one buffer; a prompt is read in a buffer of batch 1, and then put in."""

    def __init__(self, model: Decoder, cache: CacheConfig, rows: int, run: int, picture: int) -> None:
        assert cache.prefill_chunk is not None
        self._model, self._cache, self._run = model, cache, run
        self.chunk, self._widths = cache.prefill_chunk, programs.widths(cache.prefill_chunk)
        vision = model.config.vision
        self._patches = shown.widths(vision, picture) if vision is not None and picture else []
        self.nbytes = row_nbytes(model.config, cache)
        self._one = shapes(model.config, cache, 1)
        self._buffer = empty(model.config, cache, rows)
        self._settings, self._standing = programs.blank(rows)

    def warm_up(self) -> None:
        """Runs every program once, on nothing, and leaves the rows empty. Raises what compiling raises."""
        request = Request((0,), max_new_tokens=2)
        one = self.on_device(self.on_host(self.fresh()))
        if self._model.vision is not None:
            shown.warm_up(self._model.vision, self._patches)
        for width in self._widths:
            for visual in [None, shown.nothing(self._model.config, width)] if self._patches else [None]:
                part = self._read(one, [0] * width, 0, width, False, visual)
                one = part.buffer
        self.put(0, one, request, self.begin(part, request))
        self.decode()
        self.take(0)
        self.clear(0)

    def fresh(self) -> Buffer:
        """A buffer of batch 1 that has read nothing."""
        return empty(self._model.config, self._cache, 1)

    def on_device(self, held: Buffer) -> Buffer:
        """A snapshot, to be read on; it stays as it is."""
        return snapshot.to_device(held, self._one)

    def on_host(self, one: Buffer) -> Buffer:
        """A snapshot of a buffer of batch 1, which may go on and be donated."""
        return snapshot.to_host(take_row(one, 0))

    def look(self, view: View) -> View:
        """Looks at the next picture of a prompt."""
        assert self._model.vision is not None  # `shown.problems` has seen to it
        return shown.look(self._model.vision, view, self._patches)

    def read(self, one: Buffer, prompt: Sequence[int], at: int, *, wanted: bool, view: View | None = None) -> Part:
        """Reads the next chunk of a prompt, or what is left of it. `one` is donated.

        Whole chunks are counted from where reading began, and what is left is read by the narrowest program it fits.
        So a prompt's numbers depend on nothing but the prompt and where reading began.
        """
        count = min(len(prompt) - at, self.chunk)
        width = next(width for width in self._widths if width >= count)
        visual = None if view is None else shown.visual(self._model.config, view, at, count, width)
        return self._read(one, prompt, at, width, wanted, visual)

    def _read(
        self, one: Buffer, prompt: Sequence[int], at: int, width: int, wanted: bool, visual: Visual | None
    ) -> Part:
        """Reads what comes next, up to `width` tokens, by the program of this width."""
        part = prompt[at : at + width]
        following = prompt[at + 1 : at + 1 + len(part)]
        found = programs.read(
            self._model,
            padded([part], width),
            padded([following], width),
            np.int32(len(part)),
            np.array([len(prompt)], np.int32),
            one,
            np.bool_(wanted),
            visual,
        )
        return Part(at + len(part), found.hidden, found.buffer, found.log_probs, len(part))

    def begin(self, part: Part, request: Request) -> Made:
        """The first new token behind a prompt that was read whole; on the host."""
        settings, _ = programs.blank(1)
        requests.write_settings(settings, 0, request)
        return jax.device_get(programs.begin(self._model, part.hidden, part.buffer, settings))

    def put(self, row: int, one: Buffer, request: Request, made: Made) -> None:
        """Lets a row go on behind its first token."""
        self._buffer = insert_row(self._buffer, row, one)
        requests.write_settings(self._settings, row, request)
        for array, value in zip(self._standing, made.standing, strict=True):
            array[row] = value[0]

    @property
    def idle(self) -> bool:
        """Whether no row has a token to make."""
        return bool(self._standing.done.all())

    def decode(self) -> Made:
        """A run of tokens for all rows; on the host."""
        self._buffer, made = programs.decode(self._model, self._buffer, self._standing, self._settings, self._run)
        made = jax.device_get(made)
        for array, value in zip(self._standing, made.standing, strict=True):
            array[:] = value
        return made

    def take(self, row: int) -> Buffer:
        """A snapshot of a row."""
        return snapshot.to_host(take_row(self._buffer, row))

    def clear(self, row: int) -> None:
        """Empties a row: it makes no more tokens, and costs no attention."""
        self._buffer = reset_row(self._buffer, row)
        self._standing.done[row] = True
        self._settings.wanted[row] = False
        self._settings.temperature[row] = 0

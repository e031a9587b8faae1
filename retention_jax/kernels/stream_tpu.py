"""How TPU kernels read long arrays: a block at a time, each on its way from HBM while the one before it is in use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl


class Copy(NamedTuple):
    """A part of a block, and whether it is needed."""

    needed: Any
    copy: Any  # an asynchronous one


class Stream(NamedTuple):
    """The blocks first(row) .. last(row) of each row of begin .. end - 1, in this order, none left out.

    Two places on the chip take turns. `state` outlives the program: a row's last block is in use while the next row's
    first one is on its way.
    """

    state: Any  # in SMEM: how many blocks were entered, and the last of them
    begin: Any
    end: Any
    first: Callable[[Any], Any]
    last: Callable[[Any], Any]
    copies: Callable[[Any, Any, Any], list[Copy]]  # of a row's block to a place
    after: Callable[[Any, Any], Any] = lambda row, block: block + 1  # the block that follows a row's block
    stays: Callable[[Any], Any] = lambda row: False  # whether a row's last block stays, since the next one begins there

    def begin_row(self, row: Any) -> None:
        """Comes before the row's first `enter`, which may be left out."""

        @pl.when(row == self.begin)
        def _():
            self.state[0] = 0
            self._start(row, self.first(row), 0)

        stays = jnp.logical_and(row != self.begin, self.stays(jnp.maximum(row - 1, self.begin)))

        @pl.when(stays)
        def _():
            self._send_for_next(row, self.first(row))

        @pl.when(jnp.logical_not(stays))
        def _():
            self.state[1] = -1
            self.enter(row, self.first(row))

    def enter(self, row: Any, block: Any) -> Any:
        """Where a row's block lies: waits for it unless it was the last one entered, and sends for the next."""

        @pl.when(block != self.state[1])
        def _():
            entered = self.state[0]
            for part in self.copies(row, block, entered % 2):
                pl.when(part.needed)(part.copy.wait)
            self.state[0] = entered + 1
            self.state[1] = block
            self._send_for_next(row, block)

        return (self.state[0] - 1) % 2

    def _send_for_next(self, row: Any, block: Any) -> None:
        ends = block == self.last(row)
        next_row = jnp.minimum(jnp.where(ends, row + 1, row), self.end - 1)

        @pl.when(jnp.logical_not(ends) | ((row + 1 < self.end) & jnp.logical_not(self.stays(row))))
        def _():
            following = jnp.where(ends, self.first(next_row), self.after(row, block))
            self._start(next_row, following, self.state[0] % 2)

    def _start(self, row: Any, block: Any, place: Any) -> None:
        for part in self.copies(row, block, place):
            pl.when(part.needed)(part.copy.start)

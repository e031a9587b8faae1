"""SIGTERM and SIGINT as requests that a loop sees when it is ready to stop."""

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """In its block, both signals only set `requested`; where nothing would be lost, they interrupt at once."""

    requested: int = 0  # the signal
    _at_once = False

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.requested = number
        if self._at_once:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends where it stands; `requested` is set behind it."""
        self._at_once = True
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._at_once = False

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Interrupted(BaseException):
    """Not an Exception, so that nothing on its way takes it for an error that it can mend."""

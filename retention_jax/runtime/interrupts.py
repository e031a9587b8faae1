"""SIGTERM and SIGINT as requests that a loop sees when it is ready to stop."""

import signal


class Stop:
    """In its block, both signals only set `requested`."""

    requested: int = 0  # the signal

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.requested = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

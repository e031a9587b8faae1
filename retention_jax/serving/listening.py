"""A server process from its first connection to its end: it warms up, serves, drains, and ends.

It listens from the start and answers 503 until its programs are compiled, so whoever waits for it can ask. SIGTERM and
SIGINT end it: new requests are refused, those that run may end, conversations are parked. A second signal ends it at
once.
"""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from retention_jax.serving import app
from retention_jax.serving.connections import Connection
from retention_jax.serving.service import Service

_LOOKS = 1.0  # seconds between two looks at the engine
_LAST_BYTES = 5.0  # seconds for answers that are finished to reach their clients
_MOST_IDLE = 256  # connections beside those whose requests run or wait


class _Server(uvicorn.Server):
    """Signals are handled here, not by uvicorn, which would end connections first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
      ValueError: when the address is not to be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"--host={host} --port={port}: {error.strerror or error}") from error


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def config(service: Service) -> uvicorn.Config:
    """How HTTP is spoken: no more connections than can be of use, and none for ever."""
    most = service.most_sequences + _MOST_IDLE
    return uvicorn.Config(
        app.make(service),
        http=functools.partial(Connection, most=most),  # pyright: ignore[reportArgumentType]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(_LAST_BYTES),
    )


def run(service: Service, sock: socket.socket, drain_seconds: float, say: Callable[[str], object]) -> int:
    """Serves until a signal, parks everything, and returns the exit status: 0, or 1 when the engine has failed.

    Args:
      service: whose engine has not started.
      sock: as `bind` makes it.
      drain_seconds: requests that run at the end may go on for so long.
      say: told in a line what happens.

    Raises what warming the engine up raises.
    """
    return asyncio.run(_run(service, sock, drain_seconds, say))


async def _run(service: Service, sock: socket.socket, drain_seconds: float, say: Callable[[str], object]) -> int:
    loop, engine = asyncio.get_running_loop(), service.engine
    ended = asyncio.Event()
    warm: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if ended.is_set() or not warm.done():
            # Compiling cannot be interrupted, and there is nothing to park yet.
            os._exit(1 if ended.is_set() else 0)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = _Server(config(service))
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    began = time.monotonic()
    threading.Thread(target=_start, args=(service, loop, warm), name="warm-up", daemon=True).start()
    try:
        await warm
        say(f"ready after {time.monotonic() - began:.1f} s")
        while not ended.is_set() and engine.ready:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _LOOKS)
        say("draining" if ended.is_set() else "the engine has failed; the log says why")
    finally:
        service.draining.set()
        await asyncio.to_thread(engine.drain, drain_seconds)
        server.should_exit = True
        await serving
    return 0 if ended.is_set() else 1


def _start(service: Service, loop: asyncio.AbstractEventLoop, warm: "asyncio.Future[None]") -> None:
    """In a thread of its own: compiling takes long."""
    try:
        service.engine.start()
    except BaseException as error:
        loop.call_soon_threadsafe(warm.set_exception, error)
    else:
        loop.call_soon_threadsafe(warm.set_result, None)

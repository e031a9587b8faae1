"""Clients that hold a connection: they lose it, and the others do not notice."""

import contextlib
import http.client
import json
import socket
import time

import pytest
from asking_helpers import CHAT, HI, wait_until

from retention_jax.serving import connections
from retention_jax.serving import listening as listening_lib

pytestmark = pytest.mark.one_version


def dialled(address, data: bytes) -> socket.socket:
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


@pytest.fixture
def dial(listening):
    """Opens a connection to the server, and sends something."""
    with contextlib.ExitStack() as opened:
        yield lambda data=b"": opened.enter_context(dialled(listening[0], data))


def post(path, content_type="application/json", length=None, **fields):
    body = json.dumps({"model": "tiny", **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def status_of(connection) -> int:
    """Of the next whole answer; 0 where none comes."""
    response = http.client.HTTPResponse(connection)
    with contextlib.suppress(OSError, http.client.HTTPException):
        response.begin()
        response.read()
        return response.status
    return 0


def is_over(connection) -> bool:
    """Whether the server ended it; what it had sent before is read."""
    connection.settimeout(0.01)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def trickles(connection) -> bool:
    with contextlib.suppress(OSError):  # the server ended it
        connection.sendall(b"x")
    return is_over(connection)


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET", post(CHAT, "text/plain", length=10**6)],
    ids=["nothing", "half a head", "half a second head", "a body that was refused"],
)
def test_a_client_that_does_not_get_on_with_it_is_cut_off(dial, monkeypatch, data):
    """However often it sends a byte; in front of a whole second request, the clock begins anew."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    began, connection = time.monotonic(), dial(data)
    wait_until(lambda: trickles(connection) if data else is_over(connection))
    assert time.monotonic() - began > 0.4


def test_a_request_takes_its_time_on_a_connection_that_is_used_again(dial, listening, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    _, engine = listening
    connection = dial()
    for _ in range(2):
        engine.hold.set()
        connection.sendall(post(CHAT, messages=HI))
        time.sleep(0.6)
        engine.hold.clear()
        assert status_of(connection) == 200


@pytest.mark.parametrize("waits, whole", [(0.0, True), (1.5, False)])
def test_an_answer_that_nobody_reads_is_given_up(listening_to_much, monkeypatch, waits, whole):
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.5)
    with dialled(listening_to_much, b"GET / HTTP/1.0\r\n\r\n") as connection:
        time.sleep(waits)
        read = 0
        with contextlib.suppress(OSError):  # reset
            while got := connection.recv(2**20):
                read += len(got)
    assert (read > 2**25) == whole


def test_too_many_connections_are_told_so(dial):
    most = 8 + listening_lib._MOST_IDLE  # sequences of the service, and idle ones
    held = [dial() for _ in range(most)]
    assert b'"code":"unavailable"' in dial().recv(2**16)
    held[0].close()
    wait_until(lambda: status_of(dial(b"GET /health HTTP/1.0\r\n\r\n")) == 200)

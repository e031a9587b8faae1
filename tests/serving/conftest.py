"""The HTTP layer over an engine without a model: `serve` gives a client and the engine behind it."""

import asyncio
import contextlib
import socket
import threading

import pytest
import uvicorn
from fake_engine import FakeEngine, make_service
from helpers import tiny_model
from starlette.testclient import TestClient
from text_helpers import make_tokenizer

from retention_jax.config import CacheConfig
from retention_jax.generation.conversation import Writer
from retention_jax.serving import app
from retention_jax.serving import listening as listening_lib

CONTEXT = 512


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def writer(tokenizer):
    return Writer(
        model=tiny_model(vocab_size=320, context=CONTEXT),
        tokenizer=tokenizer,
        cache=CacheConfig(budget=8, recent=4, prefill_chunk=4),
        max_new_tokens=6,
        drawing={},
        seed=0,
        template=True,
        system="",
        template_kwargs={},
    )


@pytest.fixture
def serve(writer):
    """A client, and the engine behind it."""
    opened = []

    def serve(engine=None, **changes):
        engine = engine or FakeEngine()
        client = TestClient(app.make(make_service(writer, engine, **changes)), raise_server_exceptions=False)
        opened.append(client)
        return client, engine

    yield serve
    for client in opened:
        client.close()


@contextlib.contextmanager
def running(config):
    """The address of a server."""
    sock, server = socket.create_server(("127.0.0.1", 0)), uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def listening(writer):
    """The address of a server over an engine without a model, and that engine."""
    engine = FakeEngine(queue=4)
    with running(listening_lib.config(make_service(writer, engine))) as address:
        yield address, engine


@pytest.fixture
def listening_to_much(writer):
    """The address of a server whose every answer has 32 MiB, more than sockets hold."""

    async def much(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(32):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": i < 31})

    config = listening_lib.config(make_service(writer, FakeEngine()))
    config.app = much
    with running(config) as address:
        yield address

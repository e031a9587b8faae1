"""The HTTP layer over an engine without a model: `serve` gives a client and the engine behind it."""

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


@pytest.fixture
def listening(writer):
    """The address of a server over an engine without a model, and that engine."""
    engine = FakeEngine(queue=4)
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app.make(make_service(writer, engine)), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}/", engine
    server.should_exit = True
    thread.join()

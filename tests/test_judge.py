"""The judge's client, against a server of this test: every reply a server can give, and what is kept of it."""

import http.server
import json
import socket
import threading
import time

import pytest
from absl import logging

from retention_jax.tasks import judge

pytestmark = pytest.mark.one_version


def said(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Server(http.server.ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.replies, self.asked, self.waits = [], [], []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers, body))
        reply = self.server.replies.pop(0)
        if reply == "hang":
            time.sleep(0.5)
        if reply in ("hang", "drop"):
            return
        status, text, *headers = reply
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", judge.KEY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ask(server, tmp_path):
    return judge.client(server.url, "judge-1", tmp_path / "verdicts.jsonl", timeout=0.2, sleep=server.waits.append)


def test_asks_greedily_once_and_remembers(server, ask, tmp_path, monkeypatch):
    monkeypatch.setenv(judge.KEY_VARIABLE, "secret")
    server.replies = [said(" Yes.\n"), said("no")]
    assert ask("right?") == "Yes."
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "right?"}],
        "n": 1,
        "temperature": 0,
        "max_tokens": 10,
    }
    assert ask("right?") == "Yes."
    assert ask("wrong?") == "no"
    assert len(server.asked) == 2
    file = tmp_path / "verdicts.jsonl"
    assert "secret" not in file.read_text()

    again = judge.client("http://127.0.0.1:9/v1", "judge-1", file)  # nobody is there, and nobody is asked
    assert (again("right?"), again("wrong?")) == ("Yes.", "no")
    server.replies = [said("perhaps")]
    other = judge.client(server.url, "judge-2", file)
    assert other("right?") == "perhaps"
    assert "Authorization" in server.asked[2][1]


def test_no_key_is_sent_where_there_is_none(server, ask):
    server.replies = [said("yes")]
    ask("right?")
    assert "Authorization" not in server.asked[0][1]


@pytest.mark.parametrize("failure", [(429, "busy"), (500, "oh"), (503, ""), "hang", "drop"])
def test_passing_failures_are_tried_again(server, ask, failure):
    server.replies = [failure, failure, said("yes")]
    assert ask("right?") == "yes"
    assert server.waits == [1.0, 2.0]


def test_waits_as_long_as_the_server_asks(server, ask):
    server.replies = [(429, "", ("Retry-After", "7")), (429, "", ("Retry-After", "9999")), said("yes")]
    assert ask("right?") == "yes"
    assert server.waits == [7.0, 60.0]


def test_gives_up_after_six_tries_and_goes_on_later(server, ask, tmp_path):
    server.replies = [(503, "down")] * 6
    with pytest.raises(ConnectionError, match="failed 6 times, the last with status 503: down"):
        ask("right?")
    assert server.waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert not (tmp_path / "verdicts.jsonl").exists()
    server.replies = [said("yes")]
    assert ask("right?") == "yes"


REFUSED = {
    "key": ((401, '{"error": "bad key"}'), "refuses the key in OPENAI_API_KEY, status 401.*bad key"),
    "path": ((404, "no such path"), "/v1/chat/completions answers with status 404: no such path"),
    "redirect": ((302, "", ("Location", "/elsewhere")), "answers with status 302"),
    "text": ((200, "<html>hello"), "not answer with a chat completion: '<html>hello'"),
    "other": ((200, '{"choices": []}'), "not answer with a chat completion"),
    "list": ((200, "[]"), "not answer with a chat completion"),
    "empty": (said(None), "answers without text"),
}


@pytest.mark.parametrize("reply, message", REFUSED.values(), ids=REFUSED)
def test_refusals_are_told_at_once(server, ask, tmp_path, reply, message):
    server.replies = [reply]
    with pytest.raises(ValueError, match=message):
        ask("right?")
    assert server.waits == [] and len(server.asked) == 1
    assert not (tmp_path / "verdicts.jsonl").exists()


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ask = judge.client(f"http://127.0.0.1:{port}/v1", "m", tmp_path / "v.jsonl")
    with pytest.raises(ValueError, match=f"http://127.0.0.1:{port}/v1/chat/completions cannot be reached"):
        ask("right?")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/passwd", "", "https://"])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(ValueError, match="must be an address such as"):
        judge.client(url, "m", tmp_path / "v.jsonl")


def test_a_torn_last_line_is_dropped_and_asked_again(server, ask, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    file = tmp_path / "verdicts.jsonl"
    server.replies = [said("yes"), said("no")]
    ask("first?")
    ask("second?")
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first + 20, len(whole) - 1):
        file.write_bytes(whole[:cut])
        server.replies = [said("no")]
        again = judge.client(server.url, "judge-1", file)
        assert "cut short and dropped" in warnings.pop() and not warnings
        assert (again("first?"), again("second?")) == ("yes", "no")
        assert server.replies == []
        assert file.read_bytes() == whole


def test_a_damaged_file_is_told_by_line(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    file.write_text('{"key": "k", "verdict": "yes"}\nnot json\n{"key": "k"}\n[]\n')
    with pytest.raises(ValueError, match="line 2: not a verdict.*\n.*line 3: .*'verdict'.*\n.*line 4: ") as error:
        judge.client("http://localhost/v1", "m", file)
    assert "line 1" not in str(error.value)

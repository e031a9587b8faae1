"""A language model that judges answers, behind any OpenAI-compatible endpoint; no question is put to it twice."""

import email.message
import hashlib
import http.client
import json
import os
import pathlib
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from absl import logging

from ..runtime import files
from .rows import lacking

KEY_VARIABLE = "OPENAI_API_KEY"
_TRIES = 6
_FIRST_WAIT = 1.0  # seconds before the second try, doubled before each further one
_LONGEST_WAIT = 60.0
_SHOWN = 300  # characters of a server's reply in an error


def client(
    url: str,
    model: str,
    verdicts: pathlib.Path,
    max_tokens: int = 10,
    timeout: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[str], str]:
    """A function that puts a prompt to the judge, greedily, and returns what it says.

    Args:
      url: the endpoint up to its version, such as https://api.openai.com/v1 or http://localhost:8000/v1.
      model: the judge's name there.
      verdicts: JSON lines of what has been asked; a prompt in it is answered from it, others are appended at once. A
        last line that a crash has cut short is dropped, with a warning.
      max_tokens: longest reply; a model that thinks first needs more than LongMemEval's 10.
      timeout: seconds that one try may take.
      sleep: waits so many seconds between tries.

    The key is the environment variable OPENAI_API_KEY, none where it is not set. A busy or failing server (429, 5xx, no
    reply in time, a broken connection) is asked again, six times in all, with doubled waits.

    Raises:
      ValueError: when the url is none or `verdicts` is damaged, and on a call, when there is no such server, it refuses
        (a wrong key, path or model), or its reply is not a chat completion.
      ConnectionError: on a call, when all tries fail.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"judge: {url!r} must be an address such as https://api.openai.com/v1")
    endpoint = f"{url.rstrip('/')}/chat/completions"
    known = _read(verdicts)

    def ask(prompt: str) -> str:
        key = hashlib.sha256(json.dumps([model, prompt]).encode()).hexdigest()
        if key not in known:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "n": 1,
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            verdict = _verdict(endpoint, _posted(endpoint, body, timeout, sleep))
            files.append_json_line(verdicts, {"key": key, "model": model, "prompt": prompt, "verdict": verdict})
            known[key] = verdict
        return known[key]

    return ask


# The server


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _posted(endpoint: str, body: dict[str, Any], timeout: float, sleep: Callable[[float], None]) -> bytes:
    """The reply to a request, tried again while the server is busy or failing."""
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {secret}"
    request = urllib.request.Request(endpoint, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NoRedirect)
    failure, waits = "", [min(_FIRST_WAIT * 2**i, _LONGEST_WAIT) for i in range(_TRIES - 1)]
    while True:
        asked_to_wait = 0.0
        try:
            with opener.open(request, timeout=timeout) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(_SHOWN).decode(errors="replace").strip()
            failure = f"status {error.code}: {said}"
            if error.code == 401:
                raise ValueError(f"judge: {endpoint} refuses the key in {KEY_VARIABLE}, {failure}") from None
            if error.code != 429 and error.code < 500:
                raise ValueError(f"judge: {endpoint} answers with {failure}") from None
            asked_to_wait = _asked_to_wait(error.headers)
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        except urllib.error.URLError as error:
            passing = isinstance(error.reason, TimeoutError | ConnectionError)
            if not passing or isinstance(error.reason, ConnectionRefusedError):
                raise ValueError(f"judge: {endpoint} cannot be reached: {error.reason}") from error
            failure = f"{type(error.reason).__name__}: {error.reason}"
        if not waits:
            raise ConnectionError(f"judge: {endpoint} failed {_TRIES} times, the last with {failure}")
        wait = max(waits.pop(0), asked_to_wait)
        logging.warning("judge: %s, next try in %g s: %s", endpoint, wait, failure)
        sleep(wait)


def _asked_to_wait(headers: email.message.Message) -> float:
    seconds = headers.get("Retry-After", "")
    return min(float(seconds), _LONGEST_WAIT) if seconds.isdecimal() else 0.0


def _verdict(endpoint: str, reply: bytes) -> str:
    shown = reply[:_SHOWN].decode(errors="replace")
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"judge: {endpoint} does not answer with a chat completion: {shown!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"judge: {endpoint} answers without text; a longer reply may be needed: {shown!r}")
    return text.strip().encode(errors="replace").decode()  # half a surrogate pair could not be written down


# The file of verdicts


def _read(path: pathlib.Path) -> dict[str, str]:
    rows, torn = files.read_json_lines(path)
    if torn:
        logging.warning("%s: its last line is cut short and dropped: %r", path, torn[:_SHOWN])
    known, problems = {}, []
    for number, row in enumerate(rows, 1):
        if missing := lacking(row, {"key": str, "verdict": str}):
            problems.append(f"{path}, line {number}: not a verdict of a judge, {missing[0]}")
        else:
            known[row["key"]] = row["verdict"]
    if problems:
        raise ValueError(files.first_problems(problems))
    return known

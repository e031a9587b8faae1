"""How fast an OpenAI-compatible server answers 1, 2, 4, ... clients at a time.

    python launch/load_server.py --url=http://127.0.0.1:8000 --clients=1,4,16,64 --prompt_words=1500 --new_tokens=128

Each client asks for chat completions in a stream, one after the other. No prompt is like another, so nothing comes from
a prefix cache. The table goes to standard output: new tokens a second over all clients; seconds until a request's first
text; milliseconds for each token behind it, the mean of a request; and the longest that a request's text stood still.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from absl import app, flags

from retention_jax.runtime import command

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand"
)
WORDS += (
    " part place case week company system program question work number night point home water room mother area money"
)


class Told(NamedTuple):
    """What one request took, in seconds."""

    first: float  # until its first text
    each: float  # for each token behind that, on average
    longest: float  # between two pieces of text
    tokens: int
    error: str = ""


def define_flags(values: flags.FlagValues) -> None:
    define = lambda kind, name, default, told: kind(name, default, told, flag_values=values)
    counts = ["1", "2", "4", "8", "16", "32", "64"]
    define(flags.DEFINE_string, "url", "http://127.0.0.1:8000", "Of the server; plain http.")
    define(flags.DEFINE_string, "served_model", None, "Its name for the model; the first that it lists by default.")
    define(flags.DEFINE_string, "api_key", None, "Sent as the bearer token.")
    define(flags.DEFINE_list, "clients", counts, "Clients at a time, a line of the table each.")
    define(flags.DEFINE_integer, "requests", 4, "Of each client.")
    define(flags.DEFINE_integer, "prompt_words", 200, "Of each request; most are one token.")
    define(flags.DEFINE_integer, "new_tokens", 64, "Of each request, if the model does not end sooner.")
    define(flags.DEFINE_integer, "seed", 0, "Of the prompts.")


async def _send(
    values: flags.FlagValues, method: str, path: str, body: dict | None
) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
    """Status and the connection behind the headers. The server ends the connection after its answer."""
    where = urlsplit(values.url)
    if where.scheme != "http" or not where.hostname:
        raise ValueError(f"--url must be http://HOST:PORT, got {values.url!r}")
    reader, writer = await asyncio.open_connection(where.hostname, where.port or 80)
    content = b"" if body is None else json.dumps(body).encode()
    key = "" if values.api_key is None else f"Authorization: Bearer {values.api_key}\r\n"
    head = f"{method} {where.path.rstrip('/')}{path} HTTP/1.0\r\nHost: {where.netloc}\r\n{key}"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    return status, reader, writer


async def ask(values: flags.FlagValues, body: dict) -> Told:
    """One request."""
    began = time.perf_counter()
    status, reader, writer = await _send(values, "POST", "/v1/chat/completions", body)
    if status != 200:
        told = (await reader.read(500)).decode(errors="replace")
        writer.close()
        return Told(0, 0, 0, 0, told)
    times, tokens, error = [], 0, ""
    async for line in reader:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            error = str(event["error"])
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if any((choice.get("delta") or {}).get("content") for choice in event.get("choices", ())):
            times.append(time.perf_counter())
    writer.close()
    if error or not times:
        return Told(0, 0, 0, 0, error or "there was no text")
    tokens = tokens or len(times)  # a server that does not tell sends a piece for each
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return Told(times[0] - began, (times[-1] - times[0]) / max(tokens - 1, 1), max(gaps, default=0.0), tokens)


async def client(values: flags.FlagValues, model: str, number: int) -> list[Told]:
    draw, found = random.Random(f"{values.seed} {number}"), []
    for _ in range(values.requests):
        text = " ".join(draw.choices(WORDS.split(), k=values.prompt_words))
        body = {"model": model, "messages": [{"role": "user", "content": f"Go on with this list: {text}"}]}
        body |= {"max_tokens": values.new_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        found.append(await ask(values, body))
    return found


def percentile(numbers: Sequence[float], share: float) -> float:
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def measure(values: flags.FlagValues) -> bool:
    """Prints the table; whether all requests were answered."""
    model = values.served_model
    if model is None:
        status, reader, writer = await _send(values, "GET", "/v1/models", None)
        answer = await reader.read()
        writer.close()
        if status != 200:
            raise ValueError(f"{values.url}/v1/models: status {status}: {answer[:200].decode(errors='replace')}")
        model = json.loads(answer)["data"][0]["id"]
    print(f"{model} at {values.url}: prompts of {values.prompt_words} words, at most {values.new_tokens} new tokens\n")
    print("| clients | tokens/s | first text p50, s | p99 | each token p50, ms | p99 | longest stop p99, ms | failed |")
    print("|" + " ---: |" * 8)
    all_answered = True
    for count in map(int, values.clients):
        began = time.perf_counter()
        found = await asyncio.gather(*[client(values, model, 1000 * count + n) for n in range(count)])
        seconds = time.perf_counter() - began
        told = [t for of_client in found for t in of_client]
        good, bad = [t for t in told if not t.error], [t for t in told if t.error]
        numbers = [percentile([t.first for t in good], share) for share in (0.5, 0.99)]
        numbers += [1000 * percentile([t.each for t in good], share) for share in (0.5, 0.99)]
        numbers += [1000 * percentile([t.longest for t in good], 0.99)]
        rate = sum(t.tokens for t in good) / seconds
        print(f"| {count} | {rate:,.1f} | " + " | ".join(f"{x:,.3g}" for x in numbers) + f" | {len(bad)} |", flush=True)
        if bad:
            all_answered = False
            print(f"a request failed: {bad[0].error}", file=sys.stderr)
    return all_answered


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    least = {"requests": 1, "prompt_words": 1, "new_tokens": 1}
    given = {name: getattr(values, name) for name in least}
    problems = [f"--{n} must be at least {v}, got {given[n]}" for n, v in least.items() if given[n] < v]
    if not values.clients or not all(text.isdecimal() and int(text) for text in values.clients):
        problems.append(f"--clients must be numbers from 1, got {','.join(values.clients)!r}")
    if problems:
        raise ValueError("; ".join(problems))
    return 0 if asyncio.run(measure(values)) else 1


if __name__ == "__main__":
    command.run_without_jax(main, define_flags)

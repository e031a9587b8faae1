"""The command itself, with a tiny random model: OpenAI's own client, its flags, its end and its next start."""

import asyncio
import contextlib
import importlib
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import openai
import pytest
import seeing
from absl import flags
from helpers import environment, tiny_model
from text_helpers import save_tokenizer

import retention_jax as rj
from retention_jax.runtime import command
from retention_jax.text import chat, tokenizer

pytestmark = pytest.mark.one_version

ROOT = pathlib.Path(__file__).parents[2]
CACHE = rj.CacheConfig(budget=8, recent=4, prefill_chunk=8)
HI: Any = [{"role": "user", "content": "two plus two?"}]
LONG: Any = [{"role": "user", "content": "brown"}]  # the reply has more than a thousand tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(vocab_size=320, context=2048)
    rj.save_backbone(model, folder)
    rj.save_gates(model, folder / "gates")
    save_tokenizer(folder)
    return folder


class Server:
    """A process of the command."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        given = [f"--model={folder}", f"--gates={folder / 'gates'}", "--name=tiny", "--dtype=float32", "--port=0"]
        given += ["--budget=8", "--recent=4", "--prefill_chunk=8", "--rows=3", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "retention_jax.serve", *given],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        self.told: list[str] = []
        assert self.process.stderr
        for line in self.process.stderr:
            self.told.append(line)
            if line.startswith("ready"):
                break
        address = re.search(r"at (http://127\.0\.0\.1:\d+): compiling", "".join(self.told))
        assert address and self.told[-1].startswith("ready"), "".join(self.told)
        self.url = address[1]
        self.options: dict[str, Any] = {"base_url": f"{self.url}/v1", "api_key": "secret", "max_retries": 0}
        self.client: Any = openai.OpenAI(**self.options)  # whose types ask for more than a test needs

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        self.told.append(rest)
        self.client.close()
        return self.process.returncode


@pytest.fixture(scope="module")
def server(folder):
    (folder / "keys").write_text("secret\n")
    server = Server(folder, f"--api_keys={folder / 'keys'}", "--queue=2")
    yield server
    assert server.end() == 0, server.told


def alone(folder, tokens, count):
    """What `rj.generate` writes."""
    model = rj.load(folder, folder / "gates", "float32")
    stops = tokenizer.load(folder).stop_tokens
    return rj.generate(model, [tokens], CACHE, max_new_tokens=count, stop_tokens=stops).tokens[0]


@pytest.mark.slow  # starts the command
def test_it_tells_what_a_row_costs(server):
    assert re.match(
        r"a row: [\d.]+ KiB whatever its context, 12 entries for each of 4 heads on average", server.told[0]
    )
    assert re.search(r"about [\d,]+ rows; 3 are made", server.told[1])


@pytest.mark.slow  # starts the command
def test_replies_are_those_of_generate(server, folder):
    tok = tokenizer.load(folder)
    ids = tok.encode(chat.render(tok, HI, add_generation_prompt=True), bos=False)
    want = tok.decode(alone(folder, ids, 40))
    got = server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=40)
    assert got.choices[0].message.content == want
    stream = server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=40, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == want
    got = server.client.completions.create(model="tiny", prompt=ids, max_tokens=40)
    assert got.choices[0].text == want and got.usage.prompt_tokens == len(ids)


@pytest.mark.slow  # starts the command
def test_samples_are_the_same_alone_and_in_company(server):
    def asked(client, seed):
        return client.completions.create(model="tiny", prompt="the fox", max_tokens=30, temperature=1, seed=seed, n=2)

    texts = lambda got: [choice.text for choice in got.choices]
    alone = [texts(asked(server.client, seed)) for seed in range(2)]

    async def together():
        async with openai.AsyncOpenAI(**server.options) as client:
            return [texts(got) for got in await asyncio.gather(*[asked(client, seed) for seed in range(2)])]

    assert asyncio.run(together()) == alone and len({text for pair in alone for text in pair}) == 4


@pytest.mark.slow  # starts the command
def test_scores_of_a_prompt(server, folder):
    ids = tokenizer.load(folder).encode("what is two plus two", bos=False)
    got = server.client.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=2)
    scores = got.choices[0].logprobs
    assert len(scores.tokens) == len(ids) + 1 and scores.token_logprobs[0] is None
    listed = zip(scores.top_logprobs, scores.tokens, scores.token_logprobs, strict=True)
    assert all(top[token] == score for top, token, score in [*listed][1:])
    assert all(len(top) in (2, 3) and max(top.values()) <= 0 for top in scores.top_logprobs[1:])
    written = server.client.completions.create(model="tiny", prompt=ids[:-1], max_tokens=1, logprobs=0)
    best = max(scores.top_logprobs[-2], key=scores.top_logprobs[-2].get)
    assert written.choices[0].logprobs.tokens == [best]
    assert written.choices[0].logprobs.token_logprobs[0] == pytest.approx(scores.top_logprobs[-2][best], abs=1e-3)


@pytest.mark.slow  # starts the command
def test_errors_have_the_clients_own_types(server):
    given = {"model": "tiny", "messages": HI}
    ask = lambda client=server.client, **more: client.chat.completions.create(**given | more)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        ask(temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        ask(model="other")
    with pytest.raises(openai.AuthenticationError):
        ask(server.client.with_options(api_key="wrong"))
    with pytest.raises(openai.APIStatusError, match="too many") as caught:
        server.client.completions.create(model="tiny", prompt=[5] * 3000)
    assert caught.value.status_code == 413


@pytest.mark.slow  # starts the command
def test_a_full_server_refuses_until_a_client_goes(server):
    given = {"model": "tiny", "messages": HI, "max_tokens": 3}
    ask = lambda **more: server.client.chat.completions.create(**given | more)
    for _ in range(20):  # the model is so quick that all may be over before the next one asks
        full = ask(messages=LONG, n=5, max_tokens=1900, stream=True)  # three rows, and two that wait
        assert next(iter(full)).choices
        try:
            ask()
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            break
        full.close()
    else:
        raise AssertionError("nothing was refused")
    full.close()
    for _ in range(200):
        with contextlib.suppress(openai.RateLimitError):
            assert ask().usage.completion_tokens
            return
        time.sleep(0.05)
    raise AssertionError("the rows did not become free")


@pytest.mark.slow  # starts the command
def test_what_is_kept_and_what_it_costs(server):
    asked = {"retention": {"show_kept": True}}
    got = server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=60, extra_body=asked)
    told = got.choices[0].retention
    assert sum(map(sum, told["by_head"])) == told["kept"] == sum(told["by_token"]) <= 12 * 4
    assert len(told["tokens"]) == got.usage.total_tokens - 1
    more = server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=300)
    assert more.choices[0].retention["budget_bytes"] == told["budget_bytes"]


@pytest.mark.slow  # starts the command twice
def test_it_drains_and_parks_and_goes_on_where_it_was(folder, tmp_path):
    """A request that runs at the end is finished; the conversation is taken up by the next process."""
    parked = ["--session_disk=0.1", f"--session_dir={tmp_path / 'sessions'}", "--time_limit=60"]
    server = Server(folder, *parked)
    first = server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=20)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    turns = [*HI, said, {"role": "user", "content": "why?"}]
    stream = server.client.chat.completions.create(model="tiny", messages=LONG, max_tokens=1500, stream=True)
    next(iter(stream))
    ended = threading.Thread(target=lambda: status.append(server.end()))
    status: list[int] = []
    ended.start()
    texts = [choice.delta.content or "" for event in stream for choice in event.choices]
    ended.join()
    assert status == [0] and "".join(texts), server.told
    again = Server(folder, *parked)
    got = again.client.completions.create(model="tiny", prompt="two plus two?" * 30, max_tokens=2)
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    got = again.client.chat.completions.create(model="tiny", messages=turns, max_tokens=2)
    assert got.usage.prompt_tokens_details.cached_tokens > 0
    assert again.end(signal.SIGINT) == 0


@pytest.mark.parametrize(
    "arguments, told",
    (
        (["--rows=0"], "--rows must be at least 1, got 0"),
        (["--queue=0", "--drain_seconds=-1"], "--queue must be at least 1, got 0; --drain_seconds must be at least 0"),
        (["--session_disk=1"], "--session_dir and --session_disk go together"),
        (["--session_dir=a"], "--session_dir and --session_disk go together"),
        (["--gates="], "policy 'retention' needs --gates"),
        (["--template_kwargs=[1]"], "--template_kwargs must be a JSON object"),
        (["--api_keys=nowhere"], "nowhere: No such file"),
        (["--model=builtin:recall"], "recall: has no tokenizer.json"),
        (["--host=nowhere.invalid"], "--host=nowhere.invalid --port=0: "),
        (["--port=99999"], "--port must be from 0 to 65535, got 99999"),
        (["--rows=1000000000"], "--rows=1000000000 need "),
        (["--max_new_tokens=0"], "max_new_tokens must be at least 1, got 0"),
        (["--picture_tokens=-1"], "--picture_tokens must be at least 0, got -1"),
        (["--budget=0"], "budget must be at least 1"),
        (["--mesh=data:8"], "--mesh: prompts are read one by one, so data and fsdp must be 1, got 8"),
    ),
)
def test_bad_flags_are_told_in_one_line(folder, arguments, told, capsys):
    assert told in refused(folder, capsys, *arguments)


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    model = seeing.save(folder)
    rj.save_backbone(model, folder)
    rj.save_gates(model, folder / "gates")
    return folder


def test_fewer_tokens_than_the_smallest_picture_has(seeing_folder, capsys):
    told = refused(seeing_folder, capsys, "--picture_tokens=3")
    assert "--picture_tokens must be at least 4 or 0, got 3" in told


@pytest.mark.slow  # starts the command twice
def test_pictures_are_read_as_no_more_tokens_than_allowed(seeing_folder):
    def read(*arguments):
        server = Server(seeing_folder, *arguments)
        messages = seeing.asking(seeing.picture(1, 128, 128), "what is two?")
        got = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
        assert server.end() == 0
        return got.usage.prompt_tokens

    # 128 x 128 pixels have 16 features; of at most 8, the largest square has 4.
    assert read() - read("--picture_tokens=8") == 12


def refused(folder, capsys, *arguments) -> str:
    """What the command says before it ends."""
    serve = importlib.import_module("retention_jax.serve")
    values = flags.FlagValues()
    values["verbosity"] = flags.FLAGS["verbosity"]
    serve.define_flags(values)
    given = [f"--model={folder}", f"--gates={folder / 'gates'}", "--dtype=float32", "--budget=8", "--port=0"]
    with pytest.raises(SystemExit) as ended, command.one_line_errors(debug=False):
        values(["serve", *given, *arguments])
        serve.main(["serve"], values)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == command.USER_ERROR and line.startswith("error: ")
    return line

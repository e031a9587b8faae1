"""`python -m retention_jax.generate`, on a tiny random checkpoint with a tokenizer and a chat template."""

import json
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from absl import flags, logging
from helpers import environment, tiny_model
from text_helpers import save_tokenizer

import retention_jax as rj
from retention_jax.generation import conversation, prompt_files, runs
from retention_jax.generation.conversation import Conversation, Writer
from retention_jax.text import chat, tokenizer

pytestmark = pytest.mark.one_version

CACHE = rj.CacheConfig(budget=64, recent=4)
ROWS: list[dict[str, Any]] = [{"id": f"r{i}", "prompt": "two plus" + " two" * i} for i in range(3)]
ROWS.append({"messages": [{"role": "user", "content": "the lazy dog"}], "extra": {"é": [1, None]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone with its tokenizer, and gates in `gates`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(vocab_size=320)
    rj.save_backbone(model, folder)
    rj.save_gates(model, folder / "gates")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def writer(folder):
    return Writer(
        model=rj.load(folder, folder / "gates", "float32"),
        tokenizer=tokenizer.load(folder),
        cache=CACHE,
        max_new_tokens=6,
        drawing={"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        seed=0,
        template=True,
        system="",
        template_kwargs={},
    )


def command(folder, *arguments):
    """The command's main, as `python -m` runs it. An import would put the module in place of `rj.generate`."""
    module = runpy.run_module("retention_jax.generate", run_name="command")
    values = flags.FlagValues()
    values["verbosity"] = flags.FLAGS["verbosity"]
    module["define_flags"](values)
    given = ["--dtype=float32", "--budget=64", "--recent=4", "--max_new_tokens=6", f"--gates={folder / 'gates'}"]
    values(["generate", f"--model={folder}", *given, *arguments])
    before = logging.get_verbosity()
    try:
        module["main"](["generate"], values)
    finally:
        logging.set_verbosity(before)
        assert callable(rj.generate)


def greedy(writer, tokens, count=6):
    out = rj.generate(writer.model, [tokens], CACHE, max_new_tokens=count, stop_tokens=writer.tokenizer.stop_tokens)
    return out.tokens[0]


def seen(conversation):
    return int(np.asarray(conversation.buffer.seen)[0])


def shown(writer, tokens):
    more = writer.tokenizer.stream()
    return more(tokens) + more([], end=True)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def results_of(path):
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["index"])


def test_one_prompt(folder, writer, capsys):
    command(folder, "--prompt=two plus two?", "--system=be brief", "--noenable_thinking")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two plus two?"}]
    text = chat.render(
        writer.tokenizer, messages, add_generation_prompt=True, template_kwargs={"enable_thinking": False}
    )
    assert text.endswith("</think>\n\n")
    tokens = writer.tokenizer.encode(text, bos=False)
    want = greedy(writer, tokens)
    captured = capsys.readouterr()
    assert captured.out == shown(writer, want) + "\n"
    entries = 4 * (len(tokens) + len(want) - 1)
    size = 4 * (64 + 4) * (2 * 8 * 4 + 4 + 4)
    assert f"{len(tokens)} prompt tokens, {len(want)} new tokens, " in captured.err
    assert f"kept {entries} of {entries} entries; KV {size / 2**20:.2f} MiB, a full cache" in captured.err


def test_typed_control_tokens_are_let_or_refused(writer):
    token = sorted(writer.tokenizer.special_strings())[0]
    assert writer.tokenizer.backend.token_to_id(token) in conversation.prompt_tokens(writer, f"two {token} plus")
    strict = writer._replace(control_tokens=False)
    assert conversation.prompt_tokens(strict, "two plus") == conversation.prompt_tokens(writer, "two plus")
    talked = Conversation([{"role": "user", "content": "two"}, {"role": "assistant", "content": "plus"}], 1, None)
    for ask in (
        lambda: conversation.prompt_tokens(strict, f"two {token}"),
        lambda: conversation.prompt_tokens(strict, [{"role": "user", "content": f"two {token}"}]),
        lambda: conversation.prompt_tokens(strict, "two", system=token),
        lambda: conversation.turn_tokens(strict, talked, f"two {token}"),
    ):
        with pytest.raises(ValueError, match="control tokens: .*--control_tokens"):
            ask()


def test_plain_text_needs_no_template(writer):
    raw = writer._replace(template=False)
    assert conversation.prompt_tokens(raw, "two") == writer.tokenizer.encode("two", bos=True)
    with pytest.raises(ValueError, match="messages need the chat template"):
        conversation.prompt_tokens(raw, [{"role": "user", "content": "two"}])
    with pytest.raises(ValueError, match="the prompt is empty"):
        conversation.prompt_tokens(raw, "")


@pytest.mark.slow  # starts the command three times
def test_a_file_of_prompts_goes_on_after_a_kill(folder, writer, tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    write_lines(source, ROWS)
    options = [f"--prompts={source}", f"--output={output}", "--temperature=1", "--top_p=0.9", "--seed=5"]
    command(folder, *options, "--batch_size=3")
    whole = results_of(output)
    assert [row["index"] for row in whole] == [0, 1, 2, 3]
    for row, result in zip(ROWS, whole, strict=True):
        assert {name: result[name] for name in row} == row and set(result) - set(row) == set(prompt_files.RESULT_FIELDS)
        tokens = conversation.prompt_tokens(writer, row.get("prompt") or row["messages"])
        drawn = rj.generate(
            writer.model, [tokens], CACHE, max_new_tokens=6, stop_tokens=writer.tokenizer.stop_tokens,
            temperature=1.0, top_p=0.9, seed=5, row_ids=[result["index"]],
        )  # fmt: skip
        assert result["output"] == writer.tokenizer.decode(drawn.tokens[0])
        assert result["new_tokens"] == len(drawn.tokens[0]) and result["prompt_tokens"] == len(tokens)
        assert result["stopped"] == (drawn.tokens[0][-1] == writer.tokenizer.stop_tokens[0])

    # Killed in the third line: the first two are kept as they are, the half one is dropped, in whatever batches.
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    calls = []
    original = prompt_files.generate
    monkeypatch.setattr(prompt_files, "generate", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
    command(folder, *options, "--batch_size=1")
    assert calls == [1, 1] and output.read_bytes().startswith(b"".join(lines[:2])) and results_of(output) == whole
    command(folder, *options)
    assert calls == [1, 1] and results_of(output) == whole
    assert "0 new tokens" in capsys.readouterr().err

    with pytest.raises(ValueError, match="out.jsonl, line 1: written with other settings"):
        command(folder, *options, "--budget=32")
    write_lines(source, [*ROWS[:3], {"prompt": "another"}])
    with pytest.raises(ValueError, match="out.jsonl, line [1-4]: the result of another prompt"):
        command(folder, *options)


@pytest.mark.parametrize(
    "content, message",
    (
        (b"notes\n", "line 1: no result of this command"),
        (b"notes", "does not end with a result of this command"),
        (b'{"id": "other"', "does not end with a result of this command"),
    ),
)
def test_other_files_are_not_written_over(writer, tmp_path, content, message):
    write_lines(tmp_path / "in", ROWS)
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompt_files.write_results(
            writer, prompt_files.read_prompts(writer, tmp_path / "in"), tmp_path / "out", 2, "run"
        )
    assert (tmp_path / "out").read_bytes() == content


def test_bad_lines_are_named(writer, tmp_path):
    lines = [json.dumps(ROWS[0])] * 6 + [
        '{"prompt": "x"',
        "[]",
        '{"prompt": 3}',
        '{"prompt": "a", "messages": []}',
        '{"messages": ["a"]}',
        '{"messages": [{"content": "no role"}]}',
        '{"prompt": "a", "output": "b"}',
        '{"prompt": "\\ud800"}',
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        prompt_files.read_prompts(writer, path)
    told = str(error.value).split("\n")
    assert [line.split(":")[0] for line in told] == [f"{path}, line {n}" for n in range(7, 15)]
    for line, part in zip(
        told,
        (
            "not valid JSON",
            "either prompt or",
            "got 3",
            "either prompt or",
            "objects",
            "role",
            "'output'",
            "surrogates",
        ),
        strict=True,
    ):
        assert part in line
    (tmp_path / "empty").write_text("\n\n")
    for name, message in (("empty", "has no prompts"), ("missing", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            prompt_files.read_prompts(writer, tmp_path / name)


@pytest.mark.parametrize("stops", (False, True))
def test_a_conversation_reads_only_what_is_new(writer, stops):
    # The budget keeps everything, so a turn on top of the buffer is a turn after reading all tokens once more.
    question = [{"role": "user", "content": "two plus two?"}]
    first = conversation.prompt_tokens(writer, question)
    assert isinstance(first, list)
    reply = greedy(writer, first)
    if stops:  # make the fourth token one that ends a reply
        writer = writer._replace(tokenizer=writer.tokenizer._replace(stop_tokens=(reply[3],)))
        reply = reply[: reply.index(reply[3]) + 1]
    written = []
    asked = conversation.turn_tokens(writer, Conversation(), "two plus two?")
    turn, stats = conversation.take_turn(writer, Conversation(), *asked, written.append)
    assert "".join(written) == shown(writer, reply) and stats["prompt_tokens"] == len(first)
    assert turn.last == reply[-1] and seen(turn) == len(first) + len(reply) - 1

    added = writer.tokenizer.encode("<|end|>\n<|start|>user\nand?<|end|>\n<|start|>assistant\n", bos=False)
    context = first + (reply[:-1] if stops else reply) + added
    want, written = greedy(writer, context), []
    turn, stats = conversation.take_turn(writer, turn, *conversation.turn_tokens(writer, turn, "and?"), written.append)
    assert "".join(written) == shown(writer, want)
    assert stats["prompt_tokens"] == len(added) + (not stops)
    assert seen(turn) == len(context) + len(want) - 1
    assert [m["role"] for m in turn.messages] == ["user", "assistant"] * 2


def test_a_conversation_can_be_forgotten(writer):
    written = []
    lines = ["two?\n", "\n", "/reset\n", "two?\n", "/exit\n", "two?\n"]
    totals = conversation.converse(writer, lines, written.append)
    assert written == written[: len(written) // 2] * 2 and written[-1] == "\n"
    assert totals.new_tokens == 2 * len(greedy(writer, conversation.prompt_tokens(writer, "two?")))


def test_interrupting_a_reply_ends_it_and_no_more(writer):
    written, before = [], signal.getsignal(signal.SIGINT)

    def write(text):
        written.append(text)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    tokens = conversation.prompt_tokens(writer, "two?")
    many = writer._replace(max_new_tokens=60)
    out = conversation.reply(many, tokens, write, seed=0)
    assert len(written) <= 3 and len(out.tokens) == 1 + runs._STREAMED
    assert int(np.asarray(out.buffer.seen)[0]) == len(tokens) + len(out.tokens) - 1
    assert signal.getsignal(signal.SIGINT) is before


def test_replies_can_be_made_in_a_thread(writer):
    written, tokens = [], conversation.prompt_tokens(writer, "two?")
    thread = threading.Thread(target=conversation.reply, args=(writer, tokens, written.append), kwargs={"seed": 0})
    thread.start()
    thread.join()
    assert "".join(written) == shown(writer, greedy(writer, tokens))


@pytest.mark.slow  # starts the command
def test_chat_over_a_pipe(folder, writer):
    """The command itself, in a process of its own, with no terminal."""
    root = pathlib.Path(__file__).parent.parent
    arguments = [f"--model={folder}", "--policy=streaming", "--dtype=float32", "--budget=64", "--recent=4"]
    done = subprocess.run(
        [sys.executable, "-m", "retention_jax.generate", *arguments, "--max_new_tokens=6", "--chat"],
        input="two?\n/exit\n",
        capture_output=True,
        text=True,
        cwd=root,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    want = shown(writer, greedy(writer, conversation.prompt_tokens(writer, "two?")))
    assert done.stdout == want + "\n"
    assert "6 new tokens" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_line_that_cannot_be_read_does_not_end_a_chat(writer, capsys):
    written = []
    totals = conversation.converse(writer, ["bad \udcff line\n", "two?\n"], written.append)
    assert "half a surrogate pair" in capsys.readouterr().err
    assert totals.new_tokens == len(greedy(writer, conversation.prompt_tokens(writer, "two?")))


def test_long_prompts_are_told_by_name(writer, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        conversation.warn_of_length(writer, "in.jsonl", [writer.model.config.context])
        assert not caplog.text
        conversation.warn_of_length(writer, "in.jsonl", [3, writer.model.config.context + 1])
    assert "in.jsonl: 1 of 2 prompts are longer" in caplog.text


def test_rows_may_have_a_system_message_and_tools(writer, tmp_path):
    path, row = tmp_path / "in.jsonl", {"prompt": "two?", "system": "the fox"}
    write_lines(path, [row])
    [prompt] = prompt_files.read_prompts(writer, path)
    messages = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "two?"}]
    assert prompt.tokens == conversation.prompt_tokens(writer, messages)
    write_lines(path, [row | {"tools": [{"name": "f"}]}, row | {"system": 3}])
    with pytest.raises(ValueError, match="(?s)line 1: .*tools are given.*line 2: system must be a text"):
        prompt_files.read_prompts(writer, path)


def test_the_name_of_a_run_tells_settings_apart(writer):
    name = lambda changed, **names: conversation.run_id(changed, {"model": "a", **names})
    others = [
        name(writer, model="b"),
        name(writer._replace(seed=1)),
        name(writer._replace(cache=rj.CacheConfig(budget=8, recent=4))),
        name(writer._replace(drawing={**writer.drawing, "top_p": 0.5})),
        name(writer._replace(template_kwargs={"enable_thinking": False})),
    ]
    assert len({name(writer), *others}) == 6 and name(writer) == name(writer._replace())


@pytest.mark.parametrize(
    "arguments, message",
    (
        ([], "give one of --prompt, --chat, or --prompts together with --output"),
        (["--prompt=a", "--chat"], "give one of"),
        (["--prompts=a"], "together with --output"),
        (["--chat", "--output=a"], "together with --output"),
        (["--chat", "--raw"], "--raw leaves out"),
        (["--prompt=a", "--gates="], "policy 'retention' needs --gates; streaming, random, .* do not"),
        (["--prompt=a", "--mesh=tensor:3"], "the axes must multiply to the 8 devices there are"),
        (["--prompt=a", "--mesh=rows:8"], "--mesh must be as in data:2,fsdp:4, each of the axes .*; got 'rows:8'"),
        (["--prompt=a", "--mesh=tensor:2,tensor:4"], "at most once; got 'tensor:2,tensor:4'"),
        (["--prompt=a", "--mesh=data:8"], "read one text at a time: mesh data and fsdp must be 1, got 8"),
        (["--prompts=a", "--output=b", "--mesh=data:8", "--batch_size=4"], "--batch_size must be a multiple of .* = 8"),
        (["--prompt=a", "--policy=best"], "policy must be one of retention, .*the nearest is"),
        (["--prompt=a", "--budget=0"], "budget must be at least 1"),
        (["--prompt=a", "--template_kwargs=[1]"], "must be a JSON object, got \\[1\\]"),
        (["--prompt=a", "--template_kwargs={"], "--template_kwargs is not valid JSON"),
        (["--prompt=a", "--temperature=-1"], "temperature must be at least 0, got -1.0"),
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt=", "--raw"], "the prompt is empty"),
        (["--prompt=a", "--model=builtin:recall"], "recall: has no tokenizer.json"),
        (["--prompt=a", '--template_kwargs={"messages": []}'], "'messages' is an argument of its own"),
    ),
)
def test_flags_that_do_not_go_together(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        command(folder, *arguments)


def test_a_tokenizer_of_another_model(writer):
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, but the model only 32"):
        conversation.check(writer._replace(model=tiny_model()))

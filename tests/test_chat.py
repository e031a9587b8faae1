"""Chat templates: rendering, its sandbox, and what the assistant wrote."""

import itertools
import pathlib
import shutil
import threading

import pytest
from text_helpers import TEMPLATE, make_tokenizer

from retention_jax.text import chat, templates, tokenizer

pytestmark = pytest.mark.one_version

USER, MORE = {"role": "user", "content": "two plus two?"}, {"role": "user", "content": "and three?"}
INLINE = {"role": "assistant", "content": "<think>\nhm, 2 and 2\n</think>\n\nfour."}
FIELD = {"role": "assistant", "content": "five.", "reasoning_content": "well"}
PLAIN = {"role": "assistant", "content": "four."}
SYSTEM = {"role": "system", "content": "be brief"}

QWEN = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tokenizer"
needs_qwen = pytest.mark.skipif(not QWEN.is_dir(), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen3's own template and special tokens, with the vocabulary of GPT-NeoX."""
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copy(QWEN / "neox" / "tokenizer.json", folder)
    shutil.copy(QWEN / "qwen3" / "tokenizer_config.json", folder)
    return tokenizer.load(folder)


def marked(tok, messages, **options):
    """The text of `encode_chat` with the assistant's part in brackets."""
    ids, mask = chat.encode_chat(tok, messages, **options)
    assert ids.shape == mask.shape
    parts = []
    for ours, group in itertools.groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda pair: pair[1]):
        text = tok.backend.decode([i for i, _ in group], skip_special_tokens=False)
        parts.append(f"[{text}]" if ours else text)
    return "".join(parts)


def with_template(tok, source):
    return tok._replace(chat_templates={"default": source})


def test_thinking_is_kept_in_every_turn(tok):
    want = (
        "<|start|>system\nbe brief<|end|>\n<|start|>user\ntwo plus two?<|end|>\n"
        "<|start|>assistant\n[<think>\nhm, 2 and 2\n</think>\n\nfour.<|end|>]\n"
        "<|start|>user\nand three?<|end|>\n<|start|>assistant\n[<think>\nwell\n</think>\n\nfive.<|end|>]\n"
    )
    assert marked(tok, [SYSTEM, USER, INLINE, MORE, FIELD]) == want
    assert marked(tok, [SYSTEM, USER, INLINE, MORE, FIELD, MORE]) == want + "<|start|>user\nand three?<|end|>\n"
    # At inference the template decides, and it drops old thoughts.
    asked = chat.render(tok, [USER, INLINE, MORE], add_generation_prompt=True)
    assert asked == (
        "<|start|>user\ntwo plus two?<|end|>\n<|start|>assistant\nfour.<|end|>\n"
        "<|start|>user\nand three?<|end|>\n<|start|>assistant\n"
    )


def test_thinking_off_is_part_of_the_prompt(tok):
    text = marked(tok, [USER, PLAIN, MORE, PLAIN], template_kwargs={"enable_thinking": False})
    assert text.count("<think>\n\n</think>\n\n[four.<|end|>]\n") == 2
    with pytest.raises(ValueError, match="turn 1 does not go on from the prompt, which ends with .*</think>"):
        chat.encode_chat(tok, [USER, INLINE], template_kwargs={"enable_thinking": False})


def test_one_turn_is_the_templates_text(tok):
    for messages in ([USER, INLINE], [SYSTEM, USER, FIELD], [USER, PLAIN], [SYSTEM, USER]):
        text = chat.render(tok, messages, add_generation_prompt=False)
        ids, mask = chat.encode_chat(tok, messages)
        assert ids.tolist() == tok.encode(text, bos=False)
        assert mask.any() == (messages[-1]["role"] == "assistant")


# Thinking is begun by the prompt and dropped from every answer, as in DeepSeek-R1's template.
BEGUN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content }}{% else %}"
    "{{ 'A:' + m.content.split('</think>')[-1].strip() + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:<think>\n' }}{% endif %}"
)
# The whole text ends with a token more, as in Phi-3's template.
ENDED = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|start|>assistant\n' if add_generation_prompt else eos_token }}"
)


def test_thinking_that_the_template_always_drops(tok):
    text = marked(with_template(tok, BEGUN), [USER, INLINE, MORE, FIELD, MORE, PLAIN])
    assert text == (
        "<|start|>two plus two?A:<think>\n[hm, 2 and 2\n</think>\n\nfour.<|end|>]"
        "<|start|>and three?A:<think>\n[well\n</think>\n\nfive.<|end|>]<|start|>and three?A:[four.<|end|>]"
    )
    # The thinking is also words of the answer: that it is there does not show that it was kept.
    same = {"role": "assistant", "content": "four.", "reasoning_content": "four"}
    assert marked(with_template(tok, BEGUN), [USER, same]).endswith("<think>\n[four\n</think>\n\nfour.<|end|>]")


def test_an_end_of_the_whole_text_is_not_the_assistants(tok):
    text = marked(with_template(tok, ENDED), [USER, PLAIN, MORE, PLAIN])
    assert text == (
        "<|start|>user\ntwo plus two?<|end|>\n<|start|>assistant\n[four.<|end|>]\n"
        "<|start|>user\nand three?<|end|>\n<|start|>assistant\n[four.<|end|>]\n<|end|>"
    )


def test_generation_blocks_say_it(tok):
    blocks = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    text = marked(with_template(tok, blocks), [USER, INLINE, MORE, PLAIN])
    assert text == (
        "<|start|>user\ntwo plus two?<|end|><|start|>assistant\n[<think>\nhm, 2 and 2\n</think>\n\nfour.<|end|>]"
        "<|start|>user\nand three?<|end|><|start|>assistant\n[four.<|end|>]"
    )
    # A template whose blocks lose the thinking is read like one without.
    dropping = blocks.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].strip() }}")
    assert marked(with_template(tok, dropping), [USER, INLINE, MORE, PLAIN]) == text


def test_a_turn_goes_on_where_the_last_one_ended(tok):
    closing, after = chat.continuation(tok, [USER, INLINE, MORE], 1)
    assert closing == "<|end|>"
    assert after == "\n<|start|>user\nand three?<|end|>\n<|start|>assistant\n"
    # Prompt, reply, continuation: the text that gates are trained on.
    prompt = chat.render(tok, [USER], add_generation_prompt=True)
    whole = prompt + INLINE["content"] + closing + after
    ids, _ = chat.encode_chat(tok, [USER, INLINE, MORE, FIELD])
    assert tok.backend.decode(ids.tolist(), skip_special_tokens=False).startswith(whole)


@pytest.mark.parametrize(
    "source, message",
    (
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "it writes an answer 0 times"),
        ("{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}", "it writes an answer 2 times"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "does not go on from the prompt"),
        (
            "{% for m in messages %}{{ m.content ~ ('<|start|>' if loop.index == 2 and not loop.last else '<|end|>') }}"
            "{% endfor %}",
            "a turn ends with '<|end|>' if it is the last, else with '<|start|>",
        ),
    ),
)
def test_templates_that_do_not_tell_turns_apart(tok, source, message):
    with pytest.raises(ValueError, match=message.replace("|", "\\|")):
        chat.encode_chat(with_template(tok, source), [USER, PLAIN, MORE, FIELD])


def test_tokens_with_any_of_the_assistants_characters_are_its_own(tok):
    # " 😀" is several tokens with the offsets of one character; a last space is a token without width.
    _, mask = chat.encode_chat(tok, [USER, {"role": "assistant", "content": " 😀 "}])
    text = marked(tok, [USER, {"role": "assistant", "content": " 😀 "}])
    assert text.endswith("<|start|>assistant\n[<think>\n\n</think>\n\n 😀 <|end|>]\n") and mask.sum() > 6


@needs_qwen
def test_qwens_template(qwen):
    text = marked(qwen, [SYSTEM, USER, INLINE, MORE, FIELD])
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo plus two?<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\nhm, 2 and 2\n</think>\n\nfour.<|im_end|>]\n"
        "<|im_start|>user\nand three?<|im_end|>\n<|im_start|>assistant\n[<think>\nwell\n</think>\n\nfive.<|im_end|>]\n"
    )
    assert [qwen.backend.id_to_token(i) for i in qwen.stop_tokens] == ["<|im_end|>"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2, "<é>"]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds <numbers>", "parameters": {}}}
CALLING = [
    USER,
    {"role": "assistant", "content": "", "reasoning_content": "I need a tool", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    PLAIN,
]


@needs_qwen
def test_tool_calls_are_the_assistants(qwen):
    text = marked(qwen, CALLING, tools=[TOOL])
    assert text.count("[") - text.count('": [2') == 2
    assert "[<think>\nI need a tool\n</think>\n\n<tool_call>\n" in text and "</tool_call><|im_end|>]\n" in text
    assert "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n[<think>" in text


@needs_qwen
@pytest.mark.parametrize(
    "messages, options",
    (
        ([SYSTEM, USER], {}),
        ([USER], {"enable_thinking": False}),
        ([USER, INLINE, MORE], {"enable_thinking": True}),
        ([SYSTEM, USER, FIELD, MORE, INLINE], {}),
        (CALLING, {"tools": [TOOL]}),
    ),
)
@pytest.mark.parametrize("prompt", (True, False))
def test_renders_as_transformers(qwen, messages, options, prompt):
    library = pytest.importorskip("transformers.utils.chat_template_utils")
    (want,), _ = library.render_jinja_template(
        [messages], chat_template=qwen.chat_templates["default"], add_generation_prompt=prompt, **options
    )
    tools, extra = options.get("tools"), {k: v for k, v in options.items() if k != "tools"}
    got = chat.render(qwen, messages, add_generation_prompt=prompt, tools=tools, template_kwargs=extra)
    assert got == want


def test_names_that_templates_use(tok):
    source = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ eos_token }}{{ pad_token }}{{ extra | tojson(indent=1) }}"
    )
    library = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"eos_token": "<|end|>", "extra": {"a": "<é>"}}
    (want,), _ = library.render_jinja_template([[USER, MORE]], chat_template=source, **variables)
    got = chat.render(
        with_template(tok, source),
        [USER, MORE],
        add_generation_prompt=False,
        template_kwargs={"extra": variables["extra"]},
    )
    assert got == want and "<é>" in got and "4<|end|>" in got


@pytest.mark.parametrize(
    "source, message",
    (
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, "took more than 1 seconds"),
        (
            "{% for i in range(99999) %}{% for j in range(999) %}wide{% endfor %}{% endfor %}",
            "writes more",
        ),
        ("{{ 'a' * 10**10 }}", "out of memory"),
        ("{{ 9 ** (9 ** 9) }}", "took more than 1 seconds"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ open('/etc/hostname') }}", "'open' is undefined"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("line one\n{% for %}", "line 2: "),
    ),
)
def test_bad_templates_are_stopped(tok, monkeypatch, source, message):
    monkeypatch.setattr(templates, "TIME_LIMIT", 1.0)
    monkeypatch.setattr(templates, "OUTPUT_LIMIT", 10**6)
    with pytest.raises(ValueError, match=message):
        chat.render(with_template(tok, source), [USER], add_generation_prompt=True)
    # The next one is not held back.
    assert chat.render(tok, [USER], add_generation_prompt=False) == "<|start|>user\ntwo plus two?<|end|>\n"


def test_threads_share_the_renderer(tok, monkeypatch):
    monkeypatch.setattr(templates, "TIME_LIMIT", 1.0)
    endless = with_template(tok, "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4)
    results = {}

    def work(n):
        try:
            message = {"role": "user", "content": f"number {n}"}
            results[n] = chat.render(endless if n == 2 else tok, [message], add_generation_prompt=False)
        except ValueError as error:
            results[n] = str(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "took more than 1 seconds" in results.pop(2)
    assert results == {n: f"<|start|>user\nnumber {n}<|end|>\n" for n in (0, 1, 3, 4)}


@pytest.mark.parametrize(
    "messages, options, message",
    (
        ([{"content": "x"}], {}, "a message must be an object with a role"),
        ([USER], {"template_kwargs": {"x": {1}}}, "must be JSON values: .*set"),
    ),
)
def test_bad_messages(tok, messages, options, message):
    with pytest.raises(ValueError, match=message):
        chat.render(tok, messages, add_generation_prompt=True, **options)


def test_a_folder_without_a_template(tmp_path):
    tok = make_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        chat.render(tok, [USER], add_generation_prompt=True)


def test_a_turns_end_that_stops_nothing_is_told(tmp_path):
    tok = make_tokenizer(tmp_path)
    assert chat.reply_warnings(tok, templated=True) == []
    other = tok._replace(stop_tokens=(2,))
    [warning] = chat.reply_warnings(other, templated=True)
    assert "'<|end|>'" in warning and "'<|bos|>'" in warning
    assert chat.reply_warnings(other, templated=False) == []


def test_settings_that_are_not_implemented_are_told(tmp_path):
    tok = make_tokenizer(tmp_path)
    tok = tok._replace(generation={"repetition_penalty": 1.05, "num_beams": 1, "top_p": 0.8, "stop_strings": None})
    [warning] = chat.reply_warnings(tok, templated=False)
    assert "repetition_penalty=1.05" in warning


def test_tools_need_a_template_that_writes_them(tmp_path):
    tok = make_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "x"}]
    render = lambda tok: chat.render(tok, messages, add_generation_prompt=True, tools=[{"name": "f"}])
    with pytest.raises(ValueError, match="tools are given, but the chat template does not write any"):
        render(tok)
    assert render(tok._replace(chat_templates={"default": "{{ tools[0].name }}"})) == "f"
    for value, want in (('[{"a": 1}]', [{"a": 1}]), ([], None), ("", None), (None, None)):
        assert chat.tools_of(value) == want
    for value in ("{", "3", [1], {"a": 1}):
        with pytest.raises(ValueError, match="tools"):
            chat.tools_of(value)


def test_where_templates_come_from(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tok = make_tokenizer(tmp_path, chat_template=named)
    assert chat.render(tok, [USER], add_generation_prompt=True) == "plain"
    assert chat.render(tok, [USER], add_generation_prompt=True, tools=[TOOL]) == "tools"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert chat.render(tokenizer.load(tmp_path), [USER], add_generation_prompt=False).startswith("<|start|>user")

"""Answers and the sweep: prompts, resuming after a kill, dealing and intervals, with a tiny model."""

import dataclasses
import functools
import gc
import math
import pathlib
import weakref
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model, untimed
from text_helpers import make_tokenizer

from retention_jax.config import DataConfig, EvalConfig
from retention_jax.evaluation import buffers, journal, plan, prompts, rows, sequences, sweep
from retention_jax.evaluation.answers import Answers, behind_thoughts, seed_of
from retention_jax.evaluation.sequences import Sequences
from retention_jax.generation import decoding, runs
from retention_jax.parallel import sharding
from retention_jax.tasks import text_metrics
from retention_jax.tasks.example import Cut, Example, Task, Turn

pytestmark = pytest.mark.one_version

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = EvalConfig(policies=("full", "streaming"), budgets=(6,), recent=4, batch_size=2, max_new_tokens=3)


def score(example: Example, turn: int, answer: str) -> float:
    return (len(answer) % 5) / 4


TASK = Task(
    tuple(
        Example(
            f"e{i}",
            "the quick brown fox jumps over the lazy dog. " * (1 + i % 2),
            (
                Turn("\nwhat is two plus two?", ("4",), 5, " It is", "ab"[i % 2]),
                Turn("and the dog?", ("lazy",), 5, group="dog"),
            )[: 1 + i // 3],
        )
        for i in range(5)
    ),
    "F1",
    score,
    True,
    "made here",
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=300)


@pytest.fixture
def programs_kept(monkeypatch):
    """A sweep frees the programs of finished cells, which the next test would compile again."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


def evaluated(model, tok, config, output, task=TASK):
    return sweep.run(
        [functools.partial(Answers, model, tok, config, "made", task, None)],
        lambda length: buffers.cells(config, length),
        functools.partial(buffers.buffer_of, config),
        header={},
        fingerprint={"seed": config.seed},
        output=output,
        alone=True,
    )


@pytest.mark.parametrize("chat", (True, False))
def test_a_split_prompt_has_the_tokens_of_the_whole(tok, chat):
    of = lambda aware: prompts.of_task(
        TASK._replace(chat=chat),
        tok,
        limit=None,
        query_aware=aware,
        template_kwargs={"enable_thinking": False},
        room=[999] * 5,
    )
    for split, whole, example in zip(of(False), of(True), TASK.examples, strict=True):
        assert whole.context == [] and split.context + split.turns[0] == whole.turns[0]
        assert split.turns[1:] == whole.turns[1:]
        said = example.context + example.turns[0].question
        text = (
            f"<|start|>user\n{said}<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n It is"
            if chat
            else f"{said} It is"
        )
        assert tok.backend.decode(whole.turns[0], skip_special_tokens=False) == text
        read = tok.backend.decode(split.context, skip_special_tokens=False)
        assert "what" not in read and read.endswith("lazy dog. ")
    two = of(False)[3]
    assert two.closing == chat
    later = "<|end|>\n<|start|>user\nand the dog?<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"
    assert tok.backend.decode(two.turns[1], skip_special_tokens=False) == (later if chat else "and the dog?")


def test_a_token_of_both_goes_to_the_question(tok):
    example = Example("x", "what is t", (Turn("wo", ("",), 1),))
    task = Task((example,), "F1", score, False, "")
    (prompt,) = prompts.of_task(task, tok, limit=None, query_aware=False, template_kwargs={}, room=[99])
    assert prompt.context + prompt.turns[0] == tok.encode("what is two", bos=False)
    assert len(tok.encode(" two", bos=False)) == 1 and tok.decode(prompt.context) == "what is"


TOLD = "one two three four five six seven eight nine ten. " * 4


@pytest.mark.parametrize("chat", (True, False))
@pytest.mark.parametrize("cut", get_args(Cut))
def test_too_long_prompts_lose_what_their_authors_take(tok, chat, cut):
    example = Example("x", TOLD, (Turn("what is two plus two?", ("",), 1, " It"), Turn("and the dog?", ("",), 1)))
    task = Task((example, example), "F1", score, chat, "", cut)
    of = lambda room: prompts.of_task(task, tok, limit=None, query_aware=False, template_kwargs={}, room=[999, room])
    whole, same = of(999)
    assert same == whole._replace(index=1, first_turn=2) and not same.cut
    short = of(prompts.num_tokens(whole) - 30)[1]
    assert (
        short.cut and prompts.num_tokens(short) == prompts.num_tokens(whole) - 30 and short.turns[1:] == whole.turns[1:]
    )
    text = TOLD + example.turns[0].question if cut == "middle of prompt" else TOLD
    ids = tok.encode(text, bos=False)
    left = ids[: len(ids) - 30] if cut == "end of context" else text_metrics.truncated_middle(ids, len(ids) - 30)
    said = tok.decode(left) + ("" if cut == "middle of prompt" else example.turns[0].question)
    text = f"user\n{said}\nassistant\n It" if chat else f"{said} It"
    assert tok.decode(short.context + short.turns[0]) == text
    with pytest.raises(ValueError, match="'x': no room for a prompt of .* tokens, even without its " + cut):
        of(5)


def test_prompts_that_nobody_may_cut_are_refused(model, tok):
    config = dataclasses.replace(CONFIG, context=70)
    assert (
        Answers(model, tok, config, "made", TASK._replace(cut="middle of context"), None).cut == 2
    )  # e4 lacks room to answer
    told = r"2 of 5 prompts can be longer, with their answers, than the context of 70 tokens: 'e3' has 85 and answers "
    with pytest.raises(
        ValueError, match=told + r"of up to 6\. Its authors cut nothing; another --config.eval.context lets them pass$"
    ):
        Answers(model, tok, config, "made", TASK, None)
    with pytest.raises(ValueError, match=r"'e3' has 85 and answers of up to 6\. .*, or answers of .*max_new_tokens=2$"):
        Answers(model, tok, dataclasses.replace(config, context=90), "made", TASK, None)
    fits = dataclasses.replace(config, context=90, max_new_tokens=2)
    assert Answers(model, tok, fits, "made", TASK, None).cut == 0


def test_rows_of_answers_by_hand(model, tok, tmp_path):
    found = evaluated(model, tok, CONFIG, tmp_path)
    block = Answers(model, tok, CONFIG, "made", TASK, None)
    assert [(r.policy, r.budget, r.metric, r.n, r.samples) for r in found] == [
        ("full", found[0].length, "F1", 5, 1),
        ("streaming", 6, "F1", 5, 1),
    ]
    written = journal.read(tmp_path, {"seed": 0})
    for row in found:
        mine = [a for unit, r in written.items() if unit.policy == row.policy for a in r["answers"]]
        assert len(mine) == 7 and all(1 <= a["tokens"] <= 3 for a in mine)
        scores = [x for unit, r in written.items() if unit.policy == row.policy for x in r["scores"]]
        assert scores == [score(TASK.examples[0], 0, a["text"]) for a in mine]
        by_problem = of_problems({unit: r for unit, r in written.items() if unit.policy == row.policy})
        means = [by_problem[f"e{i}"] for i in range(5)]
        mean = sum(means) / 5
        half = 2.776 * (sum((m - mean) ** 2 for m in means) / 4) ** 0.5 / 5**0.5  # t(0.975; 4), from a table
        assert (row.score, row.low, row.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-3)
        first, second = (
            {a["example"]: x for a, x in zip(mine, scores, strict=True) if a["turn"] == turn} for turn in (0, 1)
        )
        assert row.groups == pytest.approx(
            {
                "a": (first["e0"] + first["e2"] + first["e4"]) / 3,
                "b": (first["e1"] + first["e3"]) / 2,
                "dog": (second["e3"] + second["e4"]) / 2,
            }
        )
    full, streaming = found
    assert streaming.kv_bytes < full.kv_bytes == full.full_kv_bytes
    told = [a for unit, r in written.items() if unit.policy == "full" for a in r["answers"]]
    of_prompt = {p.index: prompts.num_tokens(p) for batch in block.batches for p in batch}
    seen = max(
        n + sum(a["tokens"] for a in told if a["example"] == TASK.examples[i].name) for i, n in of_prompt.items()
    )
    assert full.peak_bytes and streaming.peak_bytes and full.peak_bytes > streaming.peak_bytes  # and it ran first
    assert full.kv_bytes == 2 * 2 * seen * 2 * 8 * 4  # layers, heads, tokens; key and value of 8 numbers of 4 bytes
    assert rows.load(tmp_path / "results.json") == found


def test_told_answers_are_read_in_place_of_the_models(model, tok, tmp_path):
    asked, later = TASK.examples[3].turns
    turns = (asked._replace(told="two red foxes"), later)
    task = TASK._replace(examples=(TASK.examples[3]._replace(turns=turns),))
    config = dataclasses.replace(CONFIG, policies=("snapkv",))
    (row,) = evaluated(model, tok, config, tmp_path, task)
    (done,) = journal.read(tmp_path, {"seed": 0}).values()

    (prompt,) = prompts.of_task(task, tok, limit=None, query_aware=False, template_kwargs={}, room=[999])
    assert tok.decode(prompt.turns[1]).startswith("two red foxes\nuser\nand the dog?\n")
    (plain,) = prompts.of_task(
        task._replace(chat=False), tok, limit=None, query_aware=False, template_kwargs={}, room=[999]
    )
    assert tok.decode(plain.turns[1]) == "two red foxes\n\nand the dog?"
    cache = buffers.buffer_of(CONFIG, "snapkv", row.budget, row.length)

    def read(text, buffer):
        tokens = np.zeros((1, decoding.bucket(len(text), None)), np.int32)
        tokens[0, : len(text)] = text
        return decoding.prefill(model, tokens, cache, lengths=[len(text)], buffer=buffer)[1]

    buffer = read(prompt.context, None)
    for turn, answer in zip(prompt.turns, done["answers"], strict=True):
        branch = jax.tree.map(jnp.copy, buffer)
        out = runs.generate(model, [turn], cache, max_new_tokens=3, stop_tokens=tok.stop_tokens, buffer=branch)
        assert answer["text"] == tok.decode(out.tokens[0])
        buffer = read(turn, buffer)


@pytest.mark.slow  # answers in batches of every size
@pytest.mark.usefixtures("programs_kept")
def test_batches_change_no_answer_and_samples_differ(model, tok, tmp_path):
    sampled = dataclasses.replace(CONFIG, policies=("random_keep_prompt",), samples=2, temperature=5.0)
    texts = []
    for name, size in (("a", 2), ("b", 1)):
        evaluated(model, tok, dataclasses.replace(sampled, batch_size=size), tmp_path / name)
        done = journal.read(tmp_path / name, {"seed": 0})
        texts.append({(u.seed, a["example"], a["turn"]): a["text"] for u, r in done.items() for a in r["answers"]})
    assert texts[0] == texts[1]
    assert any(texts[0][0, f"e{i}", 0] != texts[0][1, f"e{i}", 0] for i in range(5))


@pytest.mark.slow  # answers on a mesh of 8 devices
def test_a_mesh_answers_as_one_device(model, tok, tmp_path):
    mesh = sharding.make_mesh(data=2, tensor=2)
    laid_out = jax.device_put(model, sharding.of_tree(mesh, model, sharding.DECODING))
    config = dataclasses.replace(CONFIG, policies=("retention",), batch_size=3)  # on two rows of devices
    task = TASK._replace(examples=TASK.examples[:3])
    one, many = (evaluated(m, tok, config, tmp_path / name, task) for name, m in (("one", model), ("many", laid_out)))
    measured = dict(seconds=0.0, tokens_per_second=0.0, peak_bytes=None)
    assert [r._replace(**measured) for r in many] == [r._replace(**measured) for r in one]


@pytest.mark.parametrize(
    "asked, text, said",
    [
        ("Q?<assistant>", "It is 4.", "It is 4."),
        ("Q?<assistant>", "<think>so 3, no 5</think>It is 4.", "It is 4."),
        ("Q?<assistant><think>\n", "so 3, no 5</think>It is 4.", "It is 4."),
        ("Q?<assistant><think>\n", "so 3, no 5", ""),
        ("Q?<assistant>", "<think>so 3, no 5", ""),
        ("Q?<assistant>", "<think>so</think>3<think>or", ""),
        ("what does <think> mean?", "It begins thoughts.", "It begins thoughts."),
        ("Q?<assistant><think>\n\n</think>\n\n", "4", "4"),
    ],
)
def test_thoughts_are_not_scored(asked, text, said):
    assert behind_thoughts(asked, text) == said


def test_no_two_samples_have_one_seed():
    assert len({seed_of(seed, sample) for seed in range(50) for sample in range(50)}) == 2500


@pytest.mark.usefixtures("programs_kept")
def test_what_is_done_is_not_done_again(model, tok, tmp_path, monkeypatch):
    whole = evaluated(model, tok, CONFIG, tmp_path / "whole")
    path = tmp_path / "half" / "journal-0.jsonl"
    path.parent.mkdir()
    lines = (tmp_path / "whole" / "journal-0.jsonl").read_bytes().splitlines(keepends=True)
    # Killed while it wrote the scores of the second unit; by older code.
    before = b"".join(lines[:4]).replace(rows.made_by().encode(), b"older code")
    path.write_bytes(before + lines[4][:40])
    worked, units = [], (len(lines) - 1) // 2
    answered = Answers._answered
    monkeypatch.setattr(Answers, "_answered", lambda self, *args: worked.append(args) or answered(self, *args))
    again = evaluated(model, tok, CONFIG, path.parent)
    assert len(worked) == units - 2
    assert [r.score for r in again] == [r.score for r in whole]
    assert [r.made_by for r in again] == [sorted([rows.made_by(), "older code"]), [rows.made_by()]]
    read = lambda folder: untimed(journal.read(folder, {"seed": 0}))
    assert read(path.parent) == read(tmp_path / "whole")
    assert path.read_bytes().startswith(before)
    evaluated(model, tok, CONFIG, path.parent)
    assert len(worked) == units - 2


@pytest.mark.usefixtures("programs_kept")
def test_a_judge_that_fails_loses_no_answer(model, tok, tmp_path, monkeypatch):
    def unreachable(example: Example, turn: int, answer: str) -> float:
        raise ConnectionError("judge: failed 6 times")

    config, worked, answered = dataclasses.replace(CONFIG, policies=("streaming",)), [], Answers._answered
    monkeypatch.setattr(Answers, "_answered", lambda self, *args: worked.append(args) or answered(self, *args))
    with pytest.raises(ConnectionError, match="failed 6 times"):
        evaluated(model, tok, config, tmp_path, TASK._replace(score=unreachable))
    [(unit, written)] = journal.read(tmp_path, {"seed": 0}).items()
    assert len(worked) == 1 and written["answers"] and "scores" not in written
    [row] = evaluated(model, tok, config, tmp_path)
    done = journal.read(tmp_path, {"seed": 0})
    assert len(worked) == len(done) and done[unit]["answers"] == written["answers"]
    assert row.score == pytest.approx(sum(of_problems(done).values()) / 5)


def of_problems(done):
    """Mean score of each example."""
    found: dict[str, list[float]] = {}
    for result in done.values():
        for answer, score in zip(result["answers"], result["scores"], strict=True):
            found.setdefault(answer["example"], []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


@pytest.mark.slow  # sweeps over several blocks
def test_prompts_of_one_block_are_in_memory_at_a_time(model, tok):
    made = []

    def make(name):
        gc.collect()
        assert all(block() is None for block in made)
        block = Answers(model, tok, CONFIG, name, TASK._replace(examples=TASK.examples[:1]), None)
        made.append(weakref.ref(block))
        return block

    found = sweep.run(
        [functools.partial(make, name) for name in ("a", "b")],
        lambda length: [("streaming", 6)],
        functools.partial(buffers.buffer_of, CONFIG),
        header={},
        fingerprint={},
        output=None,
        alone=True,
    )
    assert [row.task for row in found] == ["a", "b"] and found[0].score == found[1].score


def test_perplexity_is_of_all_tokens_together(model, tok, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    config = EvalConfig(tasks=("perplexity",), seeds=3, examples=1, sources=(f"perplexity={tmp_path / 'text.txt'}",))
    block = Sequences(model, config, DataConfig(), "perplexity", 12, tok, sequences.compile_once(model))
    result = {"kv_bytes": 1, "seconds": 1.0, "peak_bytes": None, "made_by": ""}
    units = block.units("streaming", 4)
    (row,) = block.rows({unit: {**result, "scores": [x]} for unit, x in zip(units, (2.0, 4.0, 8.0), strict=True)})
    half = 4.303 * math.log(2) / 3**0.5  # t(0.975; 2), from a table; logs are log 2 apart
    assert (row.score, row.low, row.high) == pytest.approx((4, 4 * math.exp(-half), 4 * math.exp(half)), rel=1e-3)


@pytest.mark.slow  # sweeps once for each thing that may differ
@pytest.mark.usefixtures("programs_kept")
def test_journals_of_another_run_are_refused(model, tok, tmp_path):
    evaluated(model, tok, CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"another run; give another --output, or go back to: seed=0 \(now 1\)"):
        journal.read(tmp_path, {"seed": 1})
    changed = TASK._replace(examples=(TASK.examples[0]._replace(context="something else. "), *TASK.examples[1:]))
    with pytest.raises(ValueError, match="results of other texts of 'made'"):
        evaluated(model, tok, CONFIG, tmp_path, changed)
    path = tmp_path / "journal-0.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"unit"', b'"unti"', 1))
    with pytest.raises(ValueError, match="line 2: no line of an evaluation's journal"):
        journal.read(tmp_path, {"seed": 0})


def test_problems_come_all_at_once():
    config = EvalConfig(tasks=("ruler/niah", "gsm9k", "longbench/hotpotqa"), policies=("h3o",))
    with pytest.raises(ValueError) as error:
        plan.check(config, DataConfig())
    for part in ("'ruler/niah'; ruler has", "'gsm9k'; known: recall", "'longbench/hotpotqa' needs", "policy 'h3o'"):
        assert part in str(error.value)

"""`launch/benchmark.py`: every sub-command once, at sizes that say nothing about speed."""

import importlib
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import app, flags, logging
from flax import nnx
from helpers import environment_for_tpu_compiler

import retention_jax as rj
from retention_jax.models.decoder import Decoder

pytestmark = pytest.mark.slow  # each command compiles all that it measures

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SHAPE = ("--layers=2", "--width=32", "--heads=4", "--kv_heads=2", "--head_size=8", "--vocab=64", "--gate_width=16")
SIZES = ("--contexts=24", "--budgets=8", "--recent=4", "--chunk=16", "--new_tokens=7", "--repeats=1")
HEADS = 4


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LAUNCH)
        yield importlib.import_module("benchmark")
        for name in [n for n in sys.modules if n in ("benchmark", "chips") or n.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]


@pytest.fixture
def run(benchmark, tmp_path):
    def run(command, *more, shape=SHAPE):
        values = flags.FlagValues()
        benchmark.define_flags(values)
        values["verbosity"] = flags.FLAGS["verbosity"]
        values(["benchmark", *shape, *SIZES, *more, f"--output={tmp_path / 'out.json'}"])
        before = logging.get_verbosity()
        try:
            benchmark.main(["benchmark", command], values)
        finally:
            logging.set_verbosity(before)
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_decode(run, tmp_path, capsys):
    content = run("decode", f"--plot={tmp_path / 'speed.png'}")
    rows = content["decode"]
    assert [(r["context"], r["what"]) for r in rows] == [(24, "full"), (24, "budget 8")]
    assert rows[1]["kv_bytes"] == HEADS * (8 + 4) * (2 * 8 * 4 + 4 + 4)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["milliseconds"])
        assert row["of_bandwidth"] == pytest.approx(
            row["gigabytes_per_second"] * 1e9 / content["ceilings"]["bandwidth"]
        )
        assert 0 < row["of_eviction"]
    assert {"device", "versions", "commit", "date", "command", "kernels"} <= content["about"].keys()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "tokens/s" in out and "x full" in out


def test_prefill(run):
    rows = run("prefill", "--contexts=40")["prefill"]
    assert [r["what"] for r in rows] == ["full", "budget 8"]
    assert all(r["tokens_per_second"] == pytest.approx(40 * 1e3 / r["milliseconds"]) for r in rows)


def test_attention(run):
    rows = run("attention", "--contexts=40")["attention"]
    assert [r["what"] for r in rows[::2]] == ["dot_product_attention, xla", "T x T bias", "retention_attention"]
    assert "x T x T bias" in rows[-1]["note"] and "x dot_product_attention, xla" in rows[-1]["note"]
    flops = 4 * 4 * 8 * 40 * 41 / 2
    assert all(r["teraflops"] == pytest.approx(flops / r["milliseconds"] / 1e9) for r in rows[::2])


def test_mass(run):
    rows = run("mass", "--contexts=40")["mass"]
    assert [r["what"] for r in rows] == ["T x T"] * 2 + ["retention_mass"] * 2
    assert all(r["temporary_bytes"] >= 0 and r["milliseconds"] > 0 for r in rows)


def test_evict(run):
    rows = run("evict", "--batches=2")["evict"]
    assert [r["what"] for r in rows] == ["jax.lax.top_k", "threshold search", "whole eviction"]
    assert rows[1]["note"].endswith("same survivors")


def test_evict_notices_other_survivors(run, monkeypatch, benchmark):
    operations = importlib.import_module("benchmarks.operations")
    wrong = lambda score, pos, head, live, capacity: np.arange(capacity)[None] + 0 * jax.lax.top_k(score, capacity)[1]
    monkeypatch.setattr(operations, "_sort", wrong)
    with pytest.raises(RuntimeError, match="the two selections differ in [1-9]"):
        run("evict")


def test_train(run):
    (row,) = run("train", "--contexts=40")["train"]
    assert row["what"] == "gate step" and 0 < row["of_mass"] < 1 and row["teraflops"] > 0


def test_a_step_does_less_work_with_fewer_labels_and_without_recomputation(run):
    least = lambda *flags: (row := run("train", "--contexts=40", *flags)["train"][0])["teraflops"] * row["milliseconds"]
    everything = least()
    assert least("--noremat") < everything and least("--labels=0.1") < everything


def test_a_checkpoint_beside_transformers(run, tmp_path):
    pytest.importorskip("torch")
    config = rj.ModelConfig(
        vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_size=8, mlp_width=48
    )
    rj.save_backbone(Decoder(config, rj.GateConfig(width=16), rngs=nnx.Rngs(1)), tmp_path / "model")
    rows = run("transformers", f"--model={tmp_path / 'model'}", "--dtype=float32", shape=())["transformers"]
    assert [r["what"] for r in rows] == ["transformers", "full", "budget 8"]
    assert rows[1]["note"].endswith("same tokens") and "x, token" in rows[2]["note"]
    assert all(r["of_bandwidth"] > 0 and r["kv_bytes"] > 0 and r["prefill_seconds"] > 0 for r in rows)


def test_startup(run):
    cold, warm = run("startup")["startup"]
    assert (cold["what"], warm["what"]) == ("no programs on disk", "programs on disk")
    assert cold["first_seconds"] > cold["second_seconds"] > 0 and min(cold["import_seconds"], cold["load_seconds"]) > 0


def test_what_does_not_fit_is_told_and_left_out(run, monkeypatch, benchmark):
    monkeypatch.setattr(importlib.import_module("benchmarks.programs"), "available_bytes", lambda: 2**16)
    rows = run("attention", "--contexts=200")["attention"]
    assert all(r["note"].startswith("does not fit: needs") and "milliseconds" not in r for r in rows)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("--model=gpt",), "--model must be one of small, qwen3_0_6b, .*, or a folder with a config.json, got 'gpt'"),
        ((f"--model={LAUNCH.parent / 'tests'}",), "a folder with a config.json, got"),
        (("--budgets=0", "--contexts=a"), "--contexts must be whole numbers above 0, got 'a'; --budgets .* got '0'"),
        (("--new_tokens=1", "--dtype=int8"), "--dtype must be .* 'int8'; --new_tokens must be at least 2"),
    ),
)
def test_bad_flags(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("decode", *arguments)


def test_unknown_commands(run):
    with pytest.raises(app.UsageError, match="one of decode, prefill, .* got \\['speed'\\]"):
        run("speed")


def test_named_shapes_are_the_published_sizes(benchmark):
    settings = importlib.import_module("benchmarks.settings")
    billions = {"qwen3_0_6b": 0.6, "qwen3_1_7b": 1.7, "qwen3_4b": 4.0, "qwen3_8b": 8.2, "qwen3_14b": 14.8}
    for name, size in billions.items():
        config = settings.model_config(name, "bfloat16")
        gate = settings.random_gate(512)
        shapes = jax.eval_shape(
            lambda config=config, gate=gate: settings.Decoder(config, gate, rngs=settings.nnx.Rngs(0))
        )
        count = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes) if a.dtype == "bfloat16")
        assert count / 1e9 == pytest.approx(size, rel=0.03), name


def test_estimates_for_a_tpu_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu")
    shape = ("--layers=5", "--width=256", "--heads=4", "--kv_heads=2", "--head_size=128", "--vocab=512")
    command = [sys.executable, LAUNCH / "benchmark.py", "decode", *shape, "--dtype=bfloat16", "--contexts=4096"]
    command += ["--budgets=1024", "--topology=v5e:2x2", f"--output={tmp_path / 'out.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_for_tpu_compiler())
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {r["what"]: r for r in json.loads((tmp_path / "out.json").read_text())["decode"]}
    step = rows["budget 1024, step"]
    # Every token reads all weights, those of all five layers: less the compiler must not count.
    layers = 5 * 2 * (256 * 128 * (4 + 2 + 2 + 4) + 3 * 256 * 768) + 5 * 4 * (256 * 512 + 512 * 512)
    assert step["gigabytes"] > layers / 1e9
    assert step["milliseconds"] == pytest.approx(1e3 * max(step["gigabytes"] / 819, step["gigaflops"] / 197e3))
    assert "full, eviction" in rows and step["of_memory"] < 0.01

"""Training: the same numbers however it is cut, interrupted or run again; every bad set-up one clear error."""

import dataclasses
import gc
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import same

from retention_jax import train
from retention_jax.config import (
    DataConfig,
    EvalConfig,
    GateConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from retention_jax.data import pipeline
from retention_jax.models import weights
from retention_jax.models.gate import GateParam
from retention_jax.parallel import distributed
from retention_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
EVAL = EvalConfig(policies=("full", "retention"), budgets=(4,), lengths=(24,), examples=2, seeds=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cache of prepared data and a tiny frozen backbone for the recall vocabulary."""
    root = tmp_path_factory.mktemp("train")
    weights.save_backbone(helpers.tiny_model(vocab_size=64), root / "backbone")
    return root


def config_of(folders, **changes) -> TrainConfig:
    data = DataConfig(
        length=24, batch_size=4, documents=64, document_lengths=(24,), cache_dir=str(folders / "cache"), decoys=0.2
    )
    base = TrainConfig(
        stage="gates",
        backbone=str(folders / "backbone"),
        data=data,
        eval=EVAL,
        gate=GateConfig(width=8, offset_init=3.0),
        loss=LossConfig(budget=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=6,
        checkpoint_every=4,
        log_every=1,
    )
    return dataclasses.replace(base, **changes)


def gates_of(model):
    return jax.tree.leaves(nnx.state(model, GateParam))


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_gates_learn_backbone_stays_and_runs_repeat(folders, tmp_path):
    config = config_of(folders, steps=30)
    first, again = (train.train(config, tmp_path / name) for name in "ab")
    assert same(gates_of(first), gates_of(again))
    before = weights.load_backbone(config.backbone, config.gate, "float32", seed=config.seed)
    assert same(nnx.state(first, nnx.Param), nnx.state(before, nnx.Param))
    assert not same(gates_of(first), gates_of(before))
    rows = metrics_of(tmp_path / "a")
    assert [r["step"] for r in rows] == list(range(1, 31))
    assert np.mean([r["capacity"] for r in rows[-5:]]) < np.mean([r["capacity"] for r in rows[:5]])
    assert {"loss", "kl", "ce", "grad_norm", "retained/layer1_head1", "tokens_per_second"} <= rows[-1].keys()
    saved = weights.load(config.backbone, tmp_path / "a" / "gates", "float32")
    assert same(gates_of(saved), gates_of(first))
    assert any((tmp_path / "a" / "tensorboard").iterdir())
    other = train.train(dataclasses.replace(config, seed=1), tmp_path / "c")
    assert not same(gates_of(other), gates_of(first))


def test_only_gates_are_in_the_optimiser_and_checkpoint(folders):
    config = config_of(folders)
    model = train.make_model(config)
    _, params, frozen = nnx.split(model, train.trained_kind(config), ...)
    moments = [a for a in jax.tree.leaves(train.make_optimizer(config.optimizer, 10).init(params)) if a.ndim]
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    assert count(moments) == 2 * count(params)
    assert count(params) == sum(a.size for a in gates_of(model)) and count(frozen) > count(params)


@pytest.mark.one_version
@pytest.mark.parametrize("remat", (False, True))
@pytest.mark.parametrize("accumulation", (1, 4))
def test_accumulation_and_remat_leave_the_step_as_it_is(folders, accumulation, remat):
    def step(config):
        model = train.make_model(config)
        graphdef, params, frozen = nnx.split(model, GateParam, ...)
        optimizer = train.make_optimizer(config.optimizer, config.steps)
        state = checkpoint.TrainState(params, optimizer.init(params), jnp.int32(0))
        tokens = helpers.tokens_of(0, 4, 24)
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "label_mask": np.ones((4, 24), bool)}
        return train.train_step(state, frozen, batch, graphdef=graphdef, optimizer=optimizer, config=config)[1]

    # The capacity term's mean over positive entries depends on what is in a micro-batch; over all, it does not.
    config = config_of(folders, loss=LossConfig(budget=4, capacity_mean="all"))
    plain = step(config)
    cut = step(
        dataclasses.replace(
            config, remat=remat, optimizer=dataclasses.replace(config.optimizer, accumulation=accumulation)
        )
    )
    helpers.assert_close(cut.losses["loss"], plain.losses["loss"])
    np.testing.assert_allclose(cut.grad_norm, plain.grad_norm, rtol=1e-4)


@pytest.mark.one_version
def test_backbone_stage_learns_and_gates_follow(folders, tmp_path):
    model = helpers.tiny_config(vocab_size=64)
    config = config_of(
        folders,
        backbone="",
        model=model,
        backbone_steps=40,
        backbone_optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=3,
        data=dataclasses.replace(config_of(folders).data, copies=1.0, shuffle=False),
    )
    train.run(config, tmp_path)
    losses = [r["loss"] for r in metrics_of(tmp_path / "backbone_run")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
    assert {r["policy"] for r in rows} == {"full", "retention"}
    weights.load(tmp_path / "backbone", tmp_path / "gates", "float32")


@pytest.mark.slow  # trains three times; test_checkpoint.py restores one state
def test_sigterm_saves_the_step_that_runs_and_the_same_call_goes_on(folders, tmp_path, monkeypatch, capsys):
    config = config_of(folders, steps=12, checkpoint_every=100)
    whole = train.train(config, tmp_path / "whole")
    save, step_fn = checkpoint.save, train.train_step

    def signalled(*args, **kwargs):
        out = step_fn(*args, **kwargs)
        if int(out[0].step) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit, match="143"):
        train.train(config, tmp_path / "cut")
    assert "stopped by SIGTERM after step 7;" in capsys.readouterr().err
    monkeypatch.setattr(train, "train_step", step_fn)
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda *a: (saved.append(int(a[1].step)), save(*a)))
    assert same(gates_of(train.train(config, tmp_path / "cut")), gates_of(whole))
    assert saved == [12]
    assert [r["step"] for r in metrics_of(tmp_path / "cut")] == list(range(1, 13))


@pytest.mark.parametrize("during", ("step", "save"))
def test_sigterm_at_the_last_step_is_not_lost(folders, tmp_path, monkeypatch, during):
    save = checkpoint.save

    def step(state, *args, **kwargs):
        if during == "step" and int(state.step) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        zero = jnp.zeros(())
        return state._replace(step=state.step + 1), train.StepMetrics({"loss": zero}, zero, None)

    def signalled(*args):
        if during == "save":
            os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(checkpoint, "save", signalled)
    with pytest.raises(SystemExit, match="143"):
        train.train(config_of(folders, checkpoint_every=100), tmp_path)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 6
    assert not (tmp_path / "eval").exists()


def start(folders, workdir: pathlib.Path) -> subprocess.Popen:
    """The whole command in a process of its own; what it says goes beside the workdir."""
    flags = {
        "backbone": folders / "backbone",
        "gate.width": 8,
        "data.length": 24,
        "data.document_lengths": "(24,)",
        "data.batch_size": 4,
        "data.documents": 64,
        "data.cache_dir": folders / "cache",
        "steps": 120,
        "checkpoint_every": 10,
        "log_every": 1,
        "eval.policies": "('retention',)",
        "eval.budgets": "(4,)",
        "eval.lengths": "(24,)",
        "eval.examples": 2,
        "eval.seeds": 1,
    }
    command = [sys.executable, "-m", "retention_jax.train", "--config=configs/recall.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    # A second start need not compile again.
    env = helpers.environment(JAX_ENABLE_COMPILATION_CACHE="true", XDG_CACHE_HOME=str(workdir.parent / "cache"))
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)


@pytest.mark.slow  # starts three runs; the next tests resume in one process
@pytest.mark.parametrize("seed", (0,))
def test_sigkill_at_a_random_step_and_again_gives_the_same_gates(folders, tmp_path, seed):
    """The whole command, in processes of its own: killed once, started again, and bitwise as if never stopped."""
    kill_after = random.Random(seed).randint(15, 90)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    running = start(folders, whole)
    assert running.wait(timeout=300) == 0, whole.with_suffix(".log").read_text()[-3000:]
    killed = start(folders, cut)
    while killed.poll() is None and (
        not (cut / "metrics.jsonl").exists() or len((cut / "metrics.jsonl").read_text().splitlines()) < kill_after
    ):
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (cut / "eval").exists()
    weights.load(folders / "backbone", cut / "gates", "float32")  # of the newest checkpoint
    again = start(folders, cut)
    assert again.wait(timeout=300) == 0
    assert (cut / "gates" / "gates.safetensors").read_bytes() == (whole / "gates" / "gates.safetensors").read_bytes()
    assert [r["step"] for r in metrics_of(cut)] == list(range(1, 121))
    assert (cut / "eval" / "results.json").exists()


def test_nan_names_the_step_and_is_not_saved(folders, tmp_path, monkeypatch):
    real = train.loss_and_metrics
    config = config_of(folders, steps=6, checkpoint_every=1)
    poisoned = lambda *a: jax.tree.map(lambda x: x * jnp.nan, real(*a))
    train.train(dataclasses.replace(config, steps=4), tmp_path / "good")
    (tmp_path / "good" / "config.json").unlink()
    monkeypatch.setattr(train, "loss_and_metrics", poisoned)
    jax.clear_caches()
    with pytest.raises(FloatingPointError, match="step 5"):
        train.train(config, tmp_path / "good")
    with checkpoint.open_manager(tmp_path / "good", keep=2) as manager:
        assert manager.latest_step() == 4


def test_workdir_of_another_config_is_refused_and_untouched(folders, tmp_path):
    train.train(config_of(folders), tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"loss\.budget=4 \(now 5\).*seed=0 \(now 3\)"):
        train.train(config_of(folders, loss=LossConfig(budget=5), seed=3), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_may_go_on_laid_out_saved_and_told_of_otherwise(folders, tmp_path):
    with checkpoint.claimed(tmp_path, config_of(folders), {}):
        pass
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    data = dataclasses.replace(config_of(folders).data, cache_dir="elsewhere")
    free = dict(mesh=MeshConfig(fsdp=4), remat=True, log_every=9, checkpoint_every=9, profile_steps=1, data=data)
    checkpoint.check_workdir(tmp_path, config_of(folders, **free), {})
    other = config_of(folders, data=dataclasses.replace(data, length=48), remat=True)
    with pytest.raises(ValueError, match=r"go back to: data\.length=24 \(now 48\)$"):
        checkpoint.check_workdir(tmp_path, other, {})


def test_a_workdir_without_checkpoints_is_nobodys(folders, tmp_path):
    """A command with a wrong file name must not keep the right one out."""
    chat = DataConfig(task="chat", files=(str(tmp_path / "godo.jsonl"),), cache_dir=str(tmp_path / "cache"), length=24)
    with pytest.raises(ValueError):
        train.train(config_of(folders, data=chat), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with checkpoint.claimed(tmp_path / "run", config_of(folders, seed=5), {}):
        pass  # killed before its first checkpoint
    train.train(config_of(folders), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0


def test_other_documents_or_weights_since_the_checkpoint_are_named(folders, tmp_path):
    """The same command, and files that changed under it."""
    text, backbone, run = tmp_path / "text.txt", tmp_path / "backbone", tmp_path / "run"
    text.write_text("one text, and more of it. " * 40)
    weights.save_backbone(helpers.tiny_model(vocab_size=257), backbone)
    data = DataConfig(task="text", path=str(text), length=24, batch_size=4, cache_dir=str(tmp_path / "cache"))
    config = config_of(folders, backbone=str(backbone), data=data, eval=EvalConfig(tasks=()))
    train.train(config, run)
    train.train(config, run)  # nothing has changed
    text.write_text("another text, and more of it. " * 40)
    refused = "run holds a run of other inputs; give another --workdir, or put back what has changed since: "
    with pytest.raises(ValueError, match=f"{refused}documents of {text}$"):
        train.train(config, run)
    text.write_text("one text, and more of it. " * 40)
    weights.save_backbone(helpers.tiny_model(vocab_size=257, seed=1), backbone)
    with pytest.raises(ValueError, match=f"{refused}weights of {backbone}$"):
        train.train(config, run)


def test_a_run_that_is_going_on_keeps_others_out(folders, tmp_path):
    with checkpoint.claimed(tmp_path, config_of(folders), {}):
        with pytest.raises(ValueError, match="lock: in use by another process"):
            train.train(config_of(folders), tmp_path)
    train.train(config_of(folders, steps=1), tmp_path)


def test_a_short_run_is_the_start_of_its_warm_up(folders, tmp_path, capsys):
    """A few steps just work, and mean what they mean in a longer run."""
    short, long = (optax_rates(OptimizerConfig(learning_rate=1.0, warmup_steps=8), steps) for steps in (4, 40))
    np.testing.assert_allclose(short[:4], long[:4])
    np.testing.assert_allclose(short[:4], np.arange(4) / 8, atol=1e-7)
    train.train(config_of(folders, optimizer=OptimizerConfig(), steps=2, eval=EvalConfig(tasks=())), tmp_path)
    assert "all of them are warm-up: optimizer.warmup_steps is 100" in capsys.readouterr().err


def optax_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rate of every step, told by the length of a step along one constant gradient."""
    optimizer = train.make_optimizer(dataclasses.replace(config, weight_decay=0.0, b1=0.0, b2=0.0), steps)
    state, rates = optimizer.init(jnp.ones(())), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state, jnp.ones(()))
        rates.append(-float(np.asarray(update)))
    return np.array(rates)


def test_processes_that_see_other_documents_are_told(folders, tmp_path, monkeypatch):
    """The other process answers as one that found another file of this name would."""
    (tmp_path / "text").write_text("one text, and more of it. " * 40)
    data = DataConfig(task="text", path=str(tmp_path / "text"), length=24, cache_dir=str(tmp_path / "cache"))
    others = '{"text": "text/0123/1.1.0"}'
    monkeypatch.setattr(distributed, "gather", lambda text: [text, others if text else ""])
    told = r"different documents: text is 'text/\w{20}/1.1.0' in process 0 and 'text/0123/1.1.0' in process 1"
    with pytest.raises(ValueError, match=told):
        pipeline.train_iterator(data, vocab_size=257, seed=0)


def test_foreign_checkpoints_are_refused(folders, tmp_path):
    config = config_of(folders)
    train.train(config, tmp_path / "a")
    # Another gate width under the same config.json: a checkpoint that does not fit.
    wider = dataclasses.replace(config, gate=GateConfig(width=16, offset_init=3.0))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"another model: .*weight has shape \(1, 2, 8\), needed \(1, 2, 16\); .*w1 .*w2"
    ):
        train.train(wider, tmp_path / "a")


# Orbax leaves reads running that complain when they are collected.
@pytest.mark.slow  # trains three times; test_checkpoint.py falls back without training
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_fallen_back_from_and_the_run_ends_the_same(folders, tmp_path, caplog):
    config = config_of(folders)
    whole = train.train(config, tmp_path)  # saves 4 and 6
    for path in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if path.parent.name == "d":
            path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    assert same(gates_of(train.train(config, tmp_path)), gates_of(whole))
    assert "checkpoints/6: damaged, going on from 4 instead" in caplog.text
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "6", "6.damaged"}
    gc.collect()


def test_profiler_window_leaves_a_trace(folders, tmp_path):
    train.train(config_of(folders, profile_start=2, profile_steps=2), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow  # compiles the step at four lengths
def test_memory_of_a_step_grows_linearly_with_the_row(folders):
    """Compiled, not run: temporaries at 1K, 4K and 16K tokens."""

    def temporaries(length):
        config = config_of(folders, remat=True, loss=LossConfig(budget=16, vocab_block=512))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, length=length, batch_size=1))
        memory = train.lower_step(config, train.architecture(config)).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, middle, large = (temporaries(n) for n in (1024, 4096, 16384))
    assert middle < 4.4 * small and large < 4.4 * middle

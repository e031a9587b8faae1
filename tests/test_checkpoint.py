"""Checkpoints: whatever happens to a file of one, what is read is what was saved, or the one before, and it is told."""

import functools
import gc
import json
import os
import pathlib
import re
import resource
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import same

from retention_jax import train
from retention_jax.config import GateConfig, OptimizerConfig
from retention_jax.models.gate import GateParam
from retention_jax.training import checkpoint
from retention_jax.training.checkpoint import TrainState

# Orbax leaves reads and writes running that complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


@functools.cache
def state_at(step: int) -> TrainState:
    gates = nnx.state(helpers.tiny_model(GateConfig(width=32)), GateParam)
    moments = train.make_optimizer(OptimizerConfig(), 200).init(gates)
    return TrainState(jax.tree.map(lambda a: a + step, gates), moments, jnp.int32(step))


def restored(workdir: pathlib.Path):
    with checkpoint.open_manager(workdir, keep=2) as manager:
        return checkpoint.restore_latest(manager, state_at(0))


@pytest.fixture
def workdir(tmp_path):
    """With checkpoints of steps 1 and 2."""
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2):
            checkpoint.save(manager, state_at(step), {"at": step})
    return tmp_path


def damage(folder: pathlib.Path, how: str) -> None:
    """Cuts every array's file in half, or flips its bytes; or takes the data position away, or changes it."""
    position = folder / "data" / "metadata"
    whole = position.read_text()
    if how == "no position":
        position.write_text("{")
    elif how == "another position":
        position.write_text(re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), whole, count=1))
        assert json.loads(position.read_text()) != json.loads(whole)
    else:
        arrays = [p for p in (folder / "state").rglob("*") if p.parent.name == "d"]
        assert arrays
        for path in arrays:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if how == "half" else bytes(255 - b for b in content))


@pytest.mark.parametrize("how", ("half", "flipped", "no position", "another position"))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(workdir, how, caplog):
    folder = workdir / "checkpoints"
    damage(folder / "2", how)
    assert same(restored(workdir), (state_at(1), {"at": 1}))
    assert "checkpoints/2: damaged, going on from 1 instead" in caplog.text
    assert {p.name for p in folder.iterdir()} == {"1", "2.damaged"}
    with checkpoint.open_manager(workdir, keep=2) as manager:
        checkpoint.save(manager, state_at(2), {"at": 2})
    assert same(restored(workdir), (state_at(2), {"at": 2}))
    damage(folder / "2", how)
    damage(folder / "1", how)
    with pytest.raises(ValueError, match=r"(?s)checkpoints/2: damaged: .*checkpoints/1: damaged: "):
        restored(workdir)


def test_one_wrong_byte_never_goes_unnoticed(workdir, caplog):
    """In whatever file of a checkpoint: the same state is read, or the one before."""
    newest, whole = workdir / "checkpoints" / "2", workdir / "whole"
    shutil.copytree(newest, whole)
    rng, noticed = np.random.default_rng(int(os.environ.get("RETENTION_JAX_TEST_SEED", "0"))), []
    for path in [p for p in whole.rglob("*") if p.is_file() and p.stat().st_size]:
        content, file = bytearray(path.read_bytes()), path.relative_to(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (newest / file).write_bytes(content)
        found = restored(workdir)
        assert found is not None
        step = found[1]["at"]
        assert same(found, (state_at(step), {"at": step})), file
        noticed += [file] * (step == 1)
        for folder in (newest, newest.with_name("2.damaged")):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, newest)
    assert any("ocdbt" in str(file) for file in noticed) and caplog.text.count("going on from 1") == len(noticed)


def test_an_array_that_is_not_what_was_saved_is_damaged(workdir, monkeypatch):
    """A byte that went wrong on the way to or from the disk, where no file's own checksum tells."""
    read = checkpoint._restore

    def with_one_bit_changed(where, like):
        found, problem = read(where, like)
        assert found is not None
        state, data = found
        leaves, structure = jax.tree.flatten(state)
        one = np.asarray(leaves[0]).copy()
        one.reshape(-1).view(np.uint32)[-1] ^= 1
        changed = jax.tree.unflatten(structure, [jnp.asarray(one), *leaves[1:]])
        return (changed if where.name == "2" else state, data), problem

    monkeypatch.setattr(checkpoint, "_restore", with_one_bit_changed)
    assert same(restored(workdir), (state_at(1), {"at": 1}))


@pytest.mark.parametrize(
    "where, told", (("array_metadatas", "Too many levels"), ("ocdbt.process_0/d", "reading array"))
)
def test_a_disk_that_fails_is_no_damage(workdir, where, told):
    """An error of the file system, met by Orbax's Python and by TensorStore: nothing is set aside."""
    files = (p for p in (workdir / "checkpoints" / "2" / "state" / where).rglob("*") if p.is_file())
    path = max(files, key=lambda p: p.stat().st_size)  # the other ones of `d` are old or small
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path.name)  # reading it fails for a reason that says nothing of what is in it
    with pytest.raises(Exception, match=told):
        restored(workdir)
    path.unlink()
    path.write_bytes(content)
    assert same(restored(workdir), (state_at(2), {"at": 2}))


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, state_at(1), {"at": 1})
        manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, free[1]))  # no file may grow beyond it
        try:
            with pytest.raises(Exception, match="(?i)too large|space|write"):
                checkpoint.save(manager, state_at(2), {"at": 2})
                manager.wait_until_finished()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert same(restored(tmp_path), (state_at(1), {"at": 1}))

"""Rows taken out, put in and emptied: the row is what it was, and no other row changes a byte."""

import jax
import numpy as np
import pytest
from helpers import same, tiny_model, tokens_of

import retention_jax as rj
from retention_jax import cache
from retention_jax.models import weights
from retention_jax.parallel import sharding

CONFIGS = (
    rj.CacheConfig(budget=4, recent=3, prefill_chunk=5),
    rj.CacheConfig(budget=4, recent=3, prefill_chunk=5, policy="h2o"),  # holds queries too
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def decoded(model, buffer, tokens):
    """Logits of each step, and the buffer after it."""
    found = []
    for t in range(tokens.shape[1]):
        logits, buffer = rj.decode(model, tokens[:, t], buffer)
        found.append(np.asarray(logits))
    return found, buffer


def rows_of(buffer, *rows):
    """What the rows hold, on the host: a donated buffer is gone."""
    return jax.tree.map(lambda a: np.asarray(a)[list(rows)], buffer)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.policy)
def test_a_taken_row_goes_on_alone_as_it_would_among_others(model, config):
    tokens = tokens_of(0, 3, 20)
    _, buffer = rj.prefill(model, tokens[:, :13], config, lengths=[13, 7, 11])
    for row in range(3):
        alone = rj.take_row(buffer, row)
        assert int(alone.seen[0]) == [13, 7, 11][row]
        for got, want in zip(sum(alone.positions(0), []), sum(buffer.positions(row), []), strict=True):
            np.testing.assert_array_equal(got, want)
        _, one = decoded(model, alone, tokens[row : row + 1, 13:])
        _, all_rows = decoded(model, jax.tree.map(lambda a: a + 0, buffer), tokens[:, 13:])
        for got, want in zip(sum(one.positions(0), []), sum(all_rows.positions(row), []), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.policy)
def test_a_row_comes_in_and_nothing_of_the_old_one_or_of_the_others_changes(model, config):
    tokens = tokens_of(1, 3, 16)
    _, buffer = rj.prefill(model, tokens[:, :9], config, lengths=[9, 4, 9])
    _, newcomer = rj.prefill(model, tokens_of(2, 1, 12), config)
    others, held = rows_of(buffer, 0, 2), rows_of(newcomer, 0)
    buffer = rj.insert_row(buffer, 1, newcomer)
    assert same(rows_of(buffer, 0, 2), others) and same(rows_of(buffer, 1), held)
    assert same(rj.take_row(buffer, 1), held)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.policy)
def test_a_row_that_is_reset_has_seen_nothing(model, config):
    _, buffer = rj.prefill(model, tokens_of(3, 3, 9), config)
    others = rows_of(buffer, 0, 1)
    buffer = rj.reset_row(buffer, 2)
    assert same(rows_of(buffer, 0, 1), others)
    assert same(rows_of(buffer, 2), rows_of(cache.empty(model.config, config, 1), 0))


@pytest.mark.slow  # a model and its buffer on meshes of 8 devices
@pytest.mark.parametrize("sizes", ({"tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}), ids=str)
def test_rows_on_a_mesh_are_those_of_one_device(model, tmp_path, sizes):
    weights.save_backbone(model, tmp_path / "model")
    rj.save_gates(model, tmp_path / "gates")
    mesh = sharding.make_mesh(**sizes)
    spread = rj.load(tmp_path / "model", gates=tmp_path / "gates", dtype="float32", mesh=mesh)
    config, tokens = CONFIGS[0], tokens_of(4, 4, 14)
    _, buffer = rj.prefill(spread, tokens, config, lengths=[14, 9, 11, 3])
    before = rows_of(buffer, 0, 1, 2, 3)
    layouts = [a.sharding for a in jax.tree.leaves(buffer)]
    third = rj.take_row(buffer, 2)
    assert same(rows_of(third, 0), jax.tree.map(lambda a: a[2:3], before))
    buffer = rj.insert_row(rj.reset_row(buffer, 2), 0, third)
    assert same(rows_of(buffer, 0, 1, 3), jax.tree.map(lambda a: a[[2, 1, 3]], before))
    assert buffer.positions(2)[0][0].size == 0
    for array, wanted in zip(jax.tree.leaves(buffer), layouts, strict=True):
        assert array.sharding.is_equivalent_to(wanted, array.ndim)
    rj.decode(spread, tokens[:, 0], buffer)  # it goes on as it is


def test_what_does_not_fit_is_refused(model):
    config = CONFIGS[0]
    _, buffer = rj.prefill(model, tokens_of(5, 2, 6), config)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"row must be from 0 to 1, .* got {row}"):
            rj.take_row(buffer, row)
    with pytest.raises(ValueError, match="batch 1, got 2"):
        rj.insert_row(buffer, 0, buffer)
    other = rj.CacheConfig(budget=5, recent=3)
    with pytest.raises(ValueError, match="configuration"):
        rj.insert_row(buffer, 0, cache.empty(model.config, other, 1))
    wider = tiny_model(head_size=16)
    with pytest.raises(ValueError, match="its pool must be .*float32.*got"):
        rj.insert_row(buffer, 0, cache.empty(wider.config, config, 1))

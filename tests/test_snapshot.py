"""A row on disk: taken up again it is bitwise what it was; what is damaged, or of something else, is refused."""

import jax
import numpy as np
import pytest
from helpers import same, tiny_model, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import retention_jax as rj
from retention_jax.cache import snapshot
from retention_jax.models import weights
from retention_jax.parallel import sharding

CONFIG = rj.CacheConfig(budget=4, recent=3, prefill_chunk=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def read(model):
    """Three rows that have read prompts of their own."""
    return rj.prefill(model, tokens_of(0, 3, 13), CONFIG, lengths=[13, 7, 11])[1]


@pytest.fixture(scope="module")
def saved(read, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "row.safetensors"
    rj.save_buffer(read, 1, path)
    return path


def test_a_row_comes_back_bitwise_and_goes_on_as_it_would(model, read, saved):
    back = rj.load_buffer(model, saved)
    assert same(back, rj.take_row(read, 1)) and back.config == CONFIG
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(back))
    tokens = [tokens_of(1, 4).tolist()]
    on = lambda buffer: rj.generate(model, tokens, CONFIG, max_new_tokens=6, buffer=buffer)
    never_parked, parked = on(rj.take_row(read, 1)), on(back)
    assert never_parked.tokens == parked.tokens and same(never_parked.buffer, parked.buffer)
    assert same(rj.load_buffer(model, saved), rj.take_row(read, 1))  # what goes on from a file does not change it


@pytest.mark.parametrize(
    "changes", (dict(dtype="bfloat16"), dict(sliding_window=6, sliding_layers=(1,)), dict(policy="h2o")), ids=str
)
def test_all_kinds_of_buffers(changes, tmp_path):
    config = rj.CacheConfig(budget=4, recent=3, policy=changes.get("policy", "retention"))
    kind = {name: value for name, value in changes.items() if name != "policy"}
    model = tiny_model(**kind)
    _, buffer = rj.prefill(model, tokens_of(2, 1, 9), config)
    rj.save_buffer(buffer, 0, tmp_path / "row")
    back = rj.load_buffer(model, tmp_path / "row")
    assert same(back, buffer) and back.windows == buffer.windows
    assert jax.tree.structure(back) == jax.tree.structure(buffer)


def test_what_belongs_to_another_model_is_refused_with_all_that_differs(saved):
    with pytest.raises(ValueError, match=r"row.safetensors: .*its pool.k must be float32\[1, 16, 16\], got .*pool.v"):
        rj.load_buffer(tiny_model(head_size=16), saved)
    with pytest.raises(ValueError, match=r"pool.k must be bfloat16\[1, 16, 8\], got float32\[1, 16, 8\]"):
        rj.load_buffer(tiny_model(dtype="bfloat16"), saved)
    with pytest.raises(ValueError, match=r"windows must be \(.*, 6\), got None"):
        rj.load_buffer(tiny_model(sliding_window=6, sliding_layers=(1,)), saved)


def test_every_torn_file_is_found_out(model, saved, tmp_path):
    whole, torn = saved.read_bytes(), tmp_path / "torn"
    for size in (0, 1, 8, 9, len(whole) // 2, len(whole) - 1):
        torn.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="torn: "):
            rj.load_buffer(model, torn)
    with pytest.raises(OSError):
        rj.load_buffer(model, tmp_path / "none")


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    return tmp_path_factory.mktemp("flipped") / "row"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found_out(model, saved, flipped, data):
    whole = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    part = data.draw(st.sampled_from(((0, header), (header, len(whole)))))
    at = data.draw(st.integers(part[0], part[1] - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    flipped.write_bytes(whole)
    with pytest.raises(ValueError):
        snapshot.read(flipped)


def test_a_later_format_is_refused(model, read, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FORMAT", 2)
    rj.save_buffer(read, 0, tmp_path / "row")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 2, but this version reads format 1"):
        rj.load_buffer(model, tmp_path / "row")


@pytest.mark.slow  # a model and its buffer on a mesh of 8 devices
def test_a_row_of_a_mesh(model, tmp_path):
    weights.save_backbone(model, tmp_path / "model")
    rj.save_gates(model, tmp_path / "gates")
    load = lambda **sizes: rj.load(
        tmp_path / "model", gates=tmp_path / "gates", dtype="float32", mesh=sharding.make_mesh(**sizes)
    )
    spread, tokens = load(data=2, context=2, tensor=2), tokens_of(4, 4, 14)
    _, buffer = rj.prefill(spread, tokens, CONFIG, lengths=[14, 9, 11, 3])
    rj.save_buffer(buffer, 2, tmp_path / "row")
    same_shards = load(tensor=4)
    back = rj.load_buffer(same_shards, tmp_path / "row")
    assert same(jax.tree.map(np.asarray, back), jax.tree.map(lambda a: np.asarray(a)[2:3], buffer))
    went_on = rj.decode(same_shards, tokens[:1, 0], back)[1]
    assert len(went_on.pool.k.sharding.device_set) == 4
    assert {p for head in went_on.positions(0)[1] for p in head.tolist()} <= set(range(12))
    with pytest.raises(ValueError, match="offset must be"):
        rj.load_buffer(model, tmp_path / "row")

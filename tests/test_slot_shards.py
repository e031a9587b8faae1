"""The buffer on a mesh: slot shards keep what one device keeps, and send each other activations and counts only."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import decode_on_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_on_mesh import MODEL, Sent, lower_decode, sent
from helpers import assert_close, environment_for_tpu_compiler, tiny_config, tiny_model, tokens_of

import retention_jax as rj
from retention_jax import cache
from retention_jax.cache.buffer import Buffer, Entries
from retention_jax.config import CacheConfig
from retention_jax.generation import decoding
from retention_jax.kernels import slot_shards
from retention_jax.kernels.partial_softmax import Partial, merge
from retention_jax.models import gate_files, weights
from retention_jax.models.inputs import Inputs
from retention_jax.parallel import sharding

L, K, H = 2, 2, 4
HEADS = L * K
TINY = tiny_config(num_layers=L, num_kv_heads=K, head_size=H)
PLAN = [7, 7, *[1] * 6, 7, *[1] * 9]  # tokens that arrive in a step
TIED = (-2.0, -1.0, -0.5, -0.25, 0.0)


def scores_by_row() -> np.ndarray:
    """log_beta [B, L, K, T]: a row for each way that scores can favour some shards."""
    rng, T = np.random.default_rng(0), sum(PLAN)
    rows = -np.exp(3 * rng.normal(size=(8, L, K, T)) - 2)
    rows[1] = rng.choice(TIED, rows[1].shape)  # ties decide
    rows[2], rows[3] = 0.0, -1.0  # nothing but ties
    rows[4] = -30.0
    rows[4, 1, 0] = -0.001  # one head takes all
    rows[5] = -(2.0 ** np.arange(T))  # old tokens outrank all new ones
    rows[6] = np.where(np.arange(T) % 8 == 3, -0.001, -30.0)  # positions of one residue class survive
    rows[7] = np.where(np.arange(T) % 2 == 0, -0.001, -30.0)
    return rows.astype(np.float32)


def tell(mesh: jax.sharding.Mesh | None, cfg: CacheConfig, model=TINY) -> list[Buffer]:
    """Made-up tokens through a buffer: chunks, then tokens one by one, in two turns. The buffer after every step."""
    log_beta = scores_by_row()
    B, _, _, T = log_beta.shape
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(B, L, K, T, H)).astype(np.float32) for _ in range(2))
    pos = np.broadcast_to(np.arange(T, dtype=np.int32), log_beta.shape)

    @jax.jit
    def take_in(buffer, new, valid):
        return cache.take_in(buffer, new, valid, prompt=False)

    @jax.jit
    def take_token(buffer, new, active):
        return cache.evict_full(cache.append(buffer, new, active))

    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        buffer, seen, story = cache.empty(model, cfg, B), 0, []
        for count in PLAN:
            new = Entries(*(jnp.asarray(a[:, :, :, seen : seen + count]) for a in (k, v, log_beta, pos)))
            seen += count
            step = take_in if count > 1 else lambda b, new, valid: take_token(b, new, valid[:, 0])
            buffer = step(buffer, new, jnp.ones((B, count), bool))
            story.append(buffer)
    return story


def in_pool(buffer: Buffer, row: int) -> list[dict[tuple[int, int], bytes]]:
    """What each shard's pool has of a row: the bytes of every (head, pos)."""
    found, arrays = [], [np.asarray(a)[row] for a in (buffer.offset, *buffer.pool)]
    for offset, *shard in zip(*(np.split(a, buffer.shards) for a in arrays), strict=True):
        assert (np.diff(offset) >= 0).all() and offset[0] == 0
        k, v, log_beta, pos = shard
        held = {}
        for head in range(HEADS):
            slots = range(offset[head], offset[head + 1])
            assert (np.diff(pos[slots.start : slots.stop]) > 0).all()
            held |= {(head, int(pos[s])): k[s].tobytes() + v[s].tobytes() + log_beta[s].tobytes() for s in slots}
        assert (pos[offset[-1] :] == -1).all()
        found.append(held)
    return found


def together(shards: list[dict[Any, bytes]]) -> dict[Any, bytes]:
    joined = {entry: value for shard in shards for entry, value in shard.items()}
    assert len(joined) == sum(map(len, shards))  # no entry is on two shards
    return joined


MESHES = (dict(context=2), dict(data=2, context=2, tensor=2), dict(tensor=8))
EVERYTHING = dict(protect_first=1, protect_last=2, min_per_head=1, threshold=0.01, horizon=5)


@pytest.fixture(scope="module")
def alone():
    stories = {}

    def story(cfg, model):
        if (cfg, model) not in stories:
            stories[cfg, model] = tell(None, cfg, model)
        return stories[cfg, model]

    return story


@pytest.mark.parametrize(
    "axes, options, sliding",
    [(axes, {}, False) for axes in MESHES]
    + [(MESHES[2], options, False) for options in (EVERYTHING, dict(local=True), dict(policy="random", seed=3))]
    + [(MESHES[1], {}, True)],
)
def test_shards_keep_what_one_device_keeps(alone, axes, options, sliding):
    model = tiny_config(num_layers=L, num_kv_heads=K, head_size=H, sliding_window=9, sliding_layers=(1,))
    model, cfg = model if sliding else TINY, CacheConfig(budget=6, recent=5, **options)
    before: list[list[dict[Any, bytes]]] = []
    mesh = sharding.make_mesh(**axes)
    for step, (one, many) in enumerate(zip(alone(cfg, model), tell(mesh, cfg, model), strict=True)):
        assert many.shards == mesh.size // axes.get("data", 1)
        np.testing.assert_array_equal(many.live, one.live)
        assert many.nbytes == one.nbytes
        now = [in_pool(many, row) for row in range(8)]
        for row, shards in enumerate(now):
            assert together(shards) == together(in_pool(one, row)), f"step {step}, row {row}"
            if before:  # a survivor never moves to another shard
                stayed = [set(a) & set(together(shards)) for a in before[row]]
                assert all(entries <= set(b) for entries, b in zip(stayed, shards, strict=True))
            sizes = [len(shard) for shard in shards]
            if step < 1:  # nothing was there before: the first chunk is dealt out evenly
                assert max(sizes) - min(sizes) <= 1
        before = now


def test_every_head_is_spread_over_the_shards():
    # 7 tokens of 4 heads, of which 24 fit: 3 for each of 8 shards, and no shard has two of a head that has at most 8.
    first = tell(sharding.make_mesh(context=8), CacheConfig(budget=6, recent=5))[0]
    for row in range(8):
        for shard in in_pool(first, row):
            heads = [head for head, _ in shard]
            assert len(heads) == len(set(heads)) == 3


def test_positions_and_live_are_those_of_one_device(alone):
    cfg = CacheConfig(budget=6, recent=5)
    one, many = alone(cfg, TINY)[-1], tell(sharding.make_mesh(context=8), cfg)[-1]
    for row in range(8):
        for got, want in zip(sum(many.positions(row), []), sum(one.positions(row), []), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("row", ("cached", "heads", "by_token"))
def test_parts_of_shards_merge_as_parts_of_one_device(row):
    # Every device ends with its own heads, tokens, or everything, as the result is laid out.
    rng, shape = np.random.default_rng(2), (1, 8, 6, 4)
    out = rng.normal(size=(8, *shape)).astype(np.float32)
    lse = 50 * rng.normal(size=(8, *shape[:3])).astype(np.float32)
    lse[:, 0, 0, 0], lse[1:, 0, 1, 1] = -np.inf, -np.inf  # no key at all; a key on one shard only
    out[lse == -np.inf] = 0
    want = merge([Partial(*map(jnp.asarray, part)) for part in zip(out, lse, strict=True)])
    mesh = sharding.make_mesh(context=4, tensor=2)
    spec = sharding.of_activation(mesh, row, shape)
    squeeze = lambda part: slot_shards.merge(Partial(part.out[0], part.lse[0]), spec)
    with jax.set_mesh(mesh):
        in_specs = (sharding.P(sharding.SLOTS),)
        mapped = jax.jit(sharding.mapped(squeeze, in_specs, Partial._make((spec, sharding.P(*spec[:3])))))
        got = mapped(Partial(jnp.asarray(out), jnp.asarray(lse)))
    np.testing.assert_allclose(got.out, want.out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(**MODEL, qk_norm=True, sliding_window=6, sliding_layers=(1,))
    weights.save_backbone(model, folder)
    gate_files.save_gates(model, folder / "gates")
    return folder


CACHE = CacheConfig(budget=5, recent=3, prefill_chunk=8)  # 40 slots; 3 recent tokens do not divide by the shards


def talk(folder, mesh):
    """Two turns with tokens between them, then generation and scores; everything that comes out."""
    model, tokens = rj.load(folder, folder / "gates", "float32", mesh=mesh), tokens_of(3, 4, 30)
    logits, buffer = rj.prefill(model, tokens[:, :13], CACHE, lengths=[13, 9, 8, 1])
    said = [logits]
    for t in range(13, 18):
        logits, buffer = rj.decode(model, tokens[:, t], buffer)
        said.append(logits)
    logits, buffer = rj.prefill(model, tokens[:, 18:22], CACHE, lengths=[4, 0, 2, 3], buffer=buffer)
    kept = [sum(buffer.positions(row), []) for row in range(4)]
    prompts = [row[:n].tolist() for row, n in zip(tokens, (9, 2, 8, 5), strict=True)]
    out = rj.generate(model, prompts, CACHE, max_new_tokens=7, temperature=0.7, stop_tokens=[3])
    scores, _ = rj.score_stream(model, tokens[:, :7], CACHE, jnp.full(4, 7))
    rows = np.array([0, 2, 3])  # the second row read nothing in the last prefill
    return np.stack([*map(np.asarray, said), np.asarray(logits)])[:, rows], kept, out, scores.log_prob


@pytest.mark.slow  # a whole model on every mesh; the buffer alone is tested below
def test_logits_and_samples_are_those_of_one_device(folder):
    logits, kept, out, log_prob = talk(folder, None)
    mesh = sharding.make_mesh(data=2, context=2, tensor=2)
    got_logits, got_kept, got_out, got_log_prob = talk(folder, mesh)
    assert_close(got_logits, logits)
    assert jax.tree.all(jax.tree.map(np.array_equal, got_kept, kept))
    assert got_out.tokens == out.tokens
    for name in ("live", "full_live", "kv_bytes", "new_tokens"):
        assert got_out.stats[name] == out.stats[name]
    assert_close(got_log_prob, log_prob)


def allowed(model: rj.ModelConfig) -> set[int]:
    """Numbers a row that decoding may send: queries and what they attended to, log-sum-exps, hidden states, logits."""
    N, K = model.num_heads, model.num_kv_heads
    sizes = {N, N * model.head_size, model.width, model.vocab_size}
    assert sizes.isdisjoint({K * model.head_size, 2 * K * model.head_size, model.num_layers * K * model.head_size})
    return sizes


def wrong(found: list[Sent], rows: int, model: rj.ModelConfig) -> list[Sent]:
    """What is neither activations nor counts. An eviction may send a number a row and shard, and no fractions."""
    counts = lambda s: s.dtype in ("s32", "u32", "pred") and np.prod(s.shape) <= rows * 8
    sizes, N = allowed(model), model.num_heads
    activations = lambda s: not s.evicting and s.shape[0] == rows and (np.prod(s.shape[1:]) in sizes or merging(s))
    # Every shard's log-sum-exps; what some heads attended to, summed over the shards.
    merging = lambda s: (
        (s.kind == "all-gather" and s.shape[2:] == (1, N))
        or (s.kind == "reduce-scatter" and N % s.shape[2] == 0 and s.shape[3:] == (model.head_size,))
    )
    return [s for s in found if not (counts(s) if s.evicting or s.dtype in ("s32", "u32", "pred") else activations(s))]


@pytest.mark.parametrize("axes", (dict(context=8), dict(data=2, tensor=4)))
def test_decode_sends_no_keys_values_or_scores(folder, axes):
    mesh, B = sharding.make_mesh(**axes), 4
    model = rj.load(folder, folder / "gates", "float32", mesh=mesh)
    found = sent(lower_decode(model, CACHE, B, mesh))
    step, evicting = [s for s in found if not s.evicting], [s for s in found if s.evicting]
    for what, part in (("a step", step), ("an eviction", evicting)):
        print(f"{axes}: {what}: {len(part)} arrays in collectives, {sum(s.bytes for s in part)} bytes: {part}")
    rows, N = B // axes.get("data", 1), 12
    assert wrong(found, rows, model.config) == []
    # The merge, once in the loop: a head's device gets it; where the mesh does not divide the heads, all do.
    shards, kind = (8, "all-reduce") if axes == dict(context=8) else (4, "reduce-scatter")
    parts, merged = (rows, shards, 1, N), (rows, 1, N if kind == "all-reduce" else N // shards, 6)
    assert [(s.kind, s.shape) for s in step].count(("all-gather", parts)) == 1
    assert [(s.kind, s.shape) for s in step].count((kind, merged)) == 1
    if axes == dict(context=8):  # weights are whole: nothing else is sent
        assert len(step) == 2 and {s.dtype for s in evicting} == {"s32"}


def test_the_check_finds_keys_that_travel(folder):
    # The layout of training cuts k and v by head.
    mesh = sharding.make_mesh(data=2, tensor=4)
    model = weights.load_backbone(folder, rj.GateConfig(width=16), "float32", seed=0, mesh=mesh)
    found = wrong(sent(lower_decode(model, CACHE, 4, mesh)), 2, model.config)
    assert (2, 1, 4, 6) in [s.shape for s in found]


@pytest.mark.slow  # compiles prefill on several meshes
def test_long_chunks_are_read_by_token(folder):
    """Where weights are less than the sums of hidden states they save, they are what is sent; nothing else changes."""
    mesh, tokens, cfg = sharding.make_mesh(context=2, tensor=4), tokens_of(5, 4, 32), CacheConfig(budget=8, recent=3)

    def sums(model, width):
        read = jax.jit(lambda model, inputs, buffer: decoding.read_chunk(model, inputs, buffer, prompt=True)[0].hidden)
        with jax.set_mesh(mesh):
            inputs = Inputs(*(jax.ShapeDtypeStruct((4, width), dtype) for dtype in (jnp.int32, jnp.bool_)))  # pyright: ignore
            found = sent(read.lower(model, inputs, cache.shapes(model.config, cfg, 4)))
        return [s for s in found if s.shape[-1] == model.config.width and s.kind in ("all-reduce", "reduce-scatter")]

    model = rj.load(folder, folder / "gates", "float32", mesh=mesh)
    assert len(sums(model, 8)) == 3  # of the embedding; behind attention and behind the MLP
    assert len(sums(model, 32)) == 1
    results = [rj.prefill(m, tokens, cfg) for m in (rj.load(folder, folder / "gates", "float32"), model)]
    (want, one), (got, many) = results
    assert_close(got, want)
    for row in range(4):
        assert jax.tree.all(jax.tree.map(np.array_equal, many.positions(row), one.positions(row)))


@pytest.mark.slow  # compiles for TPU in a process of its own
def test_the_same_on_tpu():
    pytest.importorskip("libtpu")
    script = pathlib.Path(decode_on_mesh.__file__)
    run = subprocess.run(
        [sys.executable, script, "v6e:2x4"], capture_output=True, text=True, env=environment_for_tpu_compiler()
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lists = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    found = [Sent(kind, dtype, tuple(shape), evicting) for kind, dtype, shape, evicting in lists[0]]
    assert found and wrong(found, 2, rj.ModelConfig(**{**MODEL, "head_size": 128})) == []


def refused(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_what_does_not_fit_the_mesh_is_refused_before_anything_compiles(folder, monkeypatch):
    mesh = sharding.make_mesh(data=2, tensor=4)
    model = rj.load(folder, folder / "gates", "float32", mesh=mesh)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled"))
    odd = CacheConfig(budget=5, recent=3)
    both = "buffer: the batch must be a multiple of mesh data * fsdp = 2, got 3"
    assert refused(lambda: rj.prefill(model, tokens_of(0, 3, 4), odd)) == both
    assert both in refused(lambda: rj.generate(model, [[1], [2], [3]], odd, max_new_tokens=2))
    assert both in refused(lambda: rj.score_stream(model, tokens_of(0, 3, 4), odd, jnp.full(3, 4)))
    with jax.set_mesh(sharding.make_mesh(context=8)):
        few = "layers * key/value heads * budget must be a multiple of mesh context * tensor = 8, got 2 * 2 * 5 = 20"
        assert few in refused(lambda: cache.empty(TINY, odd, 1))
    buffer = cache.empty(model.config, odd, 2)  # on no mesh
    moved = "the buffer was made for 1 slot shards, but the mesh has 4"
    assert moved in refused(lambda: rj.decode(model, jnp.zeros(2, jnp.int32), buffer))

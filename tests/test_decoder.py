"""The decoder over whole sequences: what may influence what, and what must be the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, tiny_config, tiny_model, tokens_of

from retention_jax.config import GateConfig
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam

T = 10
GATES = {
    "layers": GateConfig(width=16, offset_init=1.0),
    "untied": GateConfig(width=16, offset_init=1.0, tie_offset=False),
    "layers_and_heads": GateConfig(width=16, offset_init=1.0, share="layers_and_heads"),
    "none": GateConfig(width=16, hidden_layers=1, offset_init=1.0, share="none"),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(qk_norm=True, qkv_bias=True, output_bias=True, mlp_bias=True)


@functools.partial(jax.jit, static_argnames=("with_retention", "remat"))
def forward(model, tokens, segment_ids, with_retention, remat=False):
    return decoder.forward(model, tokens, segment_ids, with_retention=with_retention, remat=remat)


def rows_of_documents() -> np.ndarray:
    """[2, T]: two documents of 4 and 6 tokens; three of 1, 7 and 2."""
    return np.array([[1] * 4 + [2] * 6, [5] + [6] * 7 + [7] * 2], np.int32)


@pytest.mark.parametrize("with_retention", (False, True))
def test_no_token_sees_a_later_one_or_another_document(model, with_retention):
    # Every token gets an embedding of its own, so that the gradient to embedding i is the influence of token i.
    graph, embedding, rest = nnx.split(model, nnx.PathContains("embedding"), ...)
    segment_ids, tokens = rows_of_documents(), np.arange(2 * T, dtype=np.int32).reshape(2, T)

    @jax.jit
    @jax.jacrev
    def influence(embedding):
        hidden, log_beta = decoder.forward(
            nnx.merge(graph, embedding, rest), tokens, segment_ids, with_retention=with_retention
        )
        return hidden.sum(axis=-1) + log_beta.sum(axis=(1, 2))

    gradient = np.asarray(jax.tree.leaves(influence(embedding))[0])[:, :, : 2 * T]  # [row, output, token, D]
    moved = np.abs(gradient).max(axis=-1).reshape(2 * T, 2 * T) > 0
    document = (segment_ids + np.array([[0], [10]])).ravel()  # none is in both rows
    index = np.arange(2 * T)
    np.testing.assert_array_equal(moved, (index[:, None] >= index) & (document[:, None] == document))


@pytest.mark.parametrize("with_retention", (False, True))
def test_packed_documents_equal_separate_ones(model, with_retention):
    tokens, segment_ids = tokens_of(0, 2, T), rows_of_documents()
    hidden, log_beta = forward(model, tokens, segment_ids, with_retention)
    for row, start, end in ((0, 0, 4), (0, 4, T), (1, 1, 8)):
        # Padded to one length behind: what comes after has no influence.
        alone = np.zeros((2, T), np.int32)
        alone[0, : end - start] = tokens[row, start:end]
        want_hidden, want_log_beta = forward(model, alone, np.ones((2, T), np.int32), with_retention)
        assert_close(hidden[row, start:end], want_hidden[0, : end - start])
        assert_close(log_beta[row, :, :, start:end], want_log_beta[0, :, :, : end - start])


def test_document_positions():
    want = [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 0, 1]]
    np.testing.assert_array_equal(decoder.document_positions(rows_of_documents()), want)
    lengths = [[4] * 4 + [6] * 6, [1] + [7] * 7 + [2] * 2]
    np.testing.assert_array_equal(decoder.document_lengths(rows_of_documents()), lengths)


def test_remat_changes_nothing(model):
    tokens, segment_ids = tokens_of(1, 2, T), rows_of_documents()

    @functools.partial(jax.jit, static_argnums=1)
    def value_and_gradients(model, remat):
        def loss(model):
            hidden, log_beta = decoder.forward(model, tokens, segment_ids, with_retention=True, remat=remat)
            return jnp.sum(hidden**2) + jnp.sum(log_beta)

        return jax.value_and_grad(loss)(model)

    (value, gradients), (want, want_gradients) = (value_and_gradients(model, remat) for remat in (True, False))
    assert_close(value, want)
    leaves = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True))
    for got, expected in leaves:
        assert_close(got, expected, 1e-4)
    assert (
        sum(float(jnp.abs(g).max()) > 0 for g, _ in leaves) >= len(leaves) - 1
    )  # the vocabulary head is not in this loss


def test_retention_matters_unless_gates_are_open(model):
    tokens, segment_ids = tokens_of(2, 2, T), rows_of_documents()
    plain, _ = forward(model, tokens, segment_ids, False)
    assert float(jnp.abs(forward(model, tokens, segment_ids, True)[0] - plain).max()) > 1e-2
    graph, state = nnx.split(model)
    opened = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    opened.final_projection.offset[...] = jnp.full_like(opened.final_projection.offset[...], 40.0)
    hidden, log_beta = forward(opened, tokens, segment_ids, True)
    assert -1e-14 < float(log_beta.min()) <= float(log_beta.max()) <= 0
    assert_close(hidden, plain)


def test_calling_a_model_is_plain_forward_and_unembed(model):
    tokens = tokens_of(3, 2, T)
    logits, log_beta = model(tokens)
    hidden, want = forward(model, tokens, np.ones((2, T), np.int32), False)
    assert logits.shape == (2, T, 32) and log_beta.shape == (2, 2, 2, T) and log_beta.dtype == jnp.float32
    assert_close(log_beta, want)
    assert_close(logits, np.asarray(hidden) @ np.asarray(model.lm_head[...]).T)


@pytest.mark.parametrize(
    "kind, weight, offset, hidden",
    (
        ("layers", (1, 2, 16), (1, 2), (2, 16, 1, 16)),
        ("untied", (1, 2, 16), (2, 2), (2, 16, 1, 16)),
        ("layers_and_heads", (1, 1, 16), (1, 1), (2, 16, 2, 16)),
        ("none", (2, 2, 16), (2, 2), None),
    ),
)
def test_gate_shapes(kind, weight, offset, hidden):
    model = tiny_model(GATES[kind])
    assert model.final_projection.weight.shape == weight and model.final_projection.offset.shape == offset
    w2 = model.layers.retention.w2
    assert (None if w2 is None else w2.shape) == hidden
    assert model.layers.retention.w1.shape == (2, 16, 16)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", GATES)
def test_log_beta_in_float64(kind):
    # The first layer's gate sees nothing but the normed embedding, so its log_beta can be worked out alone.
    model = tiny_model(GATES[kind], seed=3)
    tokens = tokens_of(4, 1, T)
    _, log_beta = model(tokens)
    layer = jax.tree.map(lambda a: np.asarray(a, np.float64)[0], nnx.to_pure_dict(nnx.state(model.layers)))
    gate, final = layer["retention"], model.final_projection
    x = np.asarray(model.embedding[...], np.float64)[tokens[0]]
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * layer["attention_norm"]
    u = silu(x @ gate["w1"] + gate["b1"])[:, None]
    if kind != "none":
        u = silu(np.einsum("tw,whu->thu", u[:, 0], gate["w2"]) + gate["b2"])
    weight, offset = (np.asarray(a[...], np.float64)[0] for a in (final.weight, final.offset))
    want = -np.log1p(np.exp(-((u * weight).sum(axis=-1) + offset))).T
    np.testing.assert_allclose(np.asarray(log_beta)[0, 0], np.broadcast_to(want, (2, T)), rtol=2e-5)


@pytest.mark.parametrize("kind, shared", (("layers", True), ("layers_and_heads", True), ("none", False)))
def test_shared_projections_move_every_layer(kind, shared):
    # Changing the first stored projection changes log_beta of later layers exactly where it is shared.
    model, tokens = tiny_model(GATES[kind]), tokens_of(5, 1, T)
    _, before = model(tokens)
    for part in (model.final_projection.weight, model.final_projection.offset):
        part[...] = part[...].at[0].add(0.5)
    _, after = model(tokens)
    moved = np.asarray(jnp.abs(after - before).max(axis=(0, 3))) > 0  # [layer, head]
    np.testing.assert_array_equal(moved, [[True, True], [shared, shared]])


def test_gates_are_float32_and_their_own_kind():
    model = tiny_model(GATES["layers"], dtype="bfloat16")
    gates, backbone = (nnx.to_flat_state(nnx.state(model, kind)) for kind in (GateParam, nnx.Param))
    assert {v.dtype for _, v in gates} == {np.dtype("float32")} and {v.dtype for _, v in backbone} == {
        jnp.dtype("bfloat16")
    }
    assert len(gates) == 6 and not {p for p, _ in gates} & {p for p, _ in backbone}
    logits, log_beta = jax.eval_shape(model, tokens_of(0, 1, 3))
    assert logits.dtype == log_beta.dtype == jnp.float32


def test_initialisation():
    model = Decoder(tiny_config(), GateConfig(width=64), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.final_projection.offset[...], 18.0)
    for weight in (model.layers.retention.w1, model.layers.retention.w2, model.final_projection.weight):
        assert weight is not None and float(jnp.std(weight[...])) == pytest.approx(0.02, rel=0.25)
    first, second = model.layers.retention.w1[...]
    assert float(jnp.abs(first - second).max()) > 0.01  # layers do not start as copies
    np.testing.assert_array_equal(model.layers.retention.b1[...], 0.0)


@pytest.mark.parametrize("what", ("forward", "gradient"))
def test_the_program_does_not_grow_with_depth(what):
    def lines(depth):
        model = nnx.eval_shape(lambda: Decoder(tiny_config(num_layers=depth), GATES["layers"], rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
        run = lambda model, tokens: decoder.forward(model, tokens, tokens, with_retention=True)[0].sum()
        text = jax.jit(run if what == "forward" else jax.grad(run)).lower(model, tokens).as_text()
        assert re.search(rf"tensor<{depth}x", text)
        return len(text.splitlines())

    assert lines(6) == lines(2)

"""Training on packed documents with pictures: the public implementation's losses and gradients on tiny models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, gate_tensors
from test_vision_model import model_of
from vision_goldens import MODELS, media_of, needs_goldens, recorded

import retention_jax as rj
from retention_jax.config import LossConfig
from retention_jax.kernels import ops
from retention_jax.models import decoder
from retention_jax.models import vision as towers
from retention_jax.models.gate import GateParam
from retention_jax.models.inputs import Visual
from retention_jax.vision import prompt, sight

pytestmark = [needs_goldens, pytest.mark.slow(reason="gradients of both families; quicker tests show the forward pass")]
KINDS = ("global", "local")


def packed(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Visual]:
    """Tokens, segment ids, which tokens are labels, and the pictures of all documents."""
    want, model = recorded(f"{name}_train"), model_of(name)
    ids, segments = want["ids"], want["segment_ids"]
    vision, tower = model.config.vision, model.vision
    assert vision is not None and tower is not None
    cases = enumerate(map(str, want["docs"]), 1)
    docs = [prompt.assemble(ids[segments == i], media_of(name, case), vision) for i, case in cases]
    units = np.cumsum([0, *(len(doc.pixels) // 4 for doc in docs)])
    feature = [np.where(doc.feature < 0, -1, doc.feature + first) for doc, first in zip(docs, units, strict=False)]
    padding = len(ids) - sum(len(doc.tokens) for doc in docs)
    shift = np.pad(np.concatenate([doc.shift for doc in docs], axis=1), ((0, 0), (0, padding)))
    grids = tuple(grid for doc in docs for grid in doc.grids)
    whole = prompt.Prompt(
        ids,
        shift,
        0,
        np.pad(np.concatenate(feature), (0, padding), constant_values=-1).astype(np.int32),
        np.concatenate([doc.pixels for doc in docs]),
        grids,
    )
    real = segments > 0
    np.testing.assert_array_equal((shift + want["doc_positions"])[:, real], want["position_ids"][:, real])
    features, deepstack = towers.see(tower, *sight.of_prompts([whole], vision))
    visual = Visual(shift[:, None], np.zeros(1, np.int32), whole.feature[None], features, deepstack)
    return ids[None], segments[None], want["labels"][None] != -100, visual


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients(name):
    want, (tokens, segments, labels, visual) = recorded(f"{name}_train"), packed(name)
    graphdef, gates, frozen = nnx.split(model_of(name), GateParam, ...)

    def losses(gates, **changes):
        config = LossConfig(budget=int(want["memory_size"]), labels="released", **changes)
        model = nnx.merge(graphdef, gates, frozen)
        return rj.losses.distillation(model, tokens, segments, labels, config, visual=visual)

    equal = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    of_kind = {kind: losses(gates, capacity=kind) for kind in KINDS}
    equal(of_kind["global"].ce, want["ntp"])
    equal(of_kind["global"].kl, want["fwkl"])
    equal(losses(gates, capacity_weight=0.0, released_block=64).total, want["base_block64"])
    for kind in KINDS:
        equal(of_kind[kind].capacity, want[f"cap_{kind}"])
    equal(of_kind["global"].total, want["total_global"])

    def terms(gates):
        found = losses(gates, capacity="global")
        return {"base": (found.kl + found.ce) / 2, "total_global": found.total}

    checked = 0
    for term, gradient in jax.jit(jax.jacrev(terms))(gates).items():
        for tensor, value in gate_tensors(nnx.merge(graphdef, gradient, frozen)).items():
            if (expected := want.get(f"grad/{term}/{tensor}")) is not None:
                atol = 1e-4 * np.abs(expected).max()
                np.testing.assert_allclose(value, expected, rtol=0, atol=atol, err_msg=f"{term} {tensor}")
                checked += 1
    assert checked == sum(key.startswith("grad/") for key in want)


@pytest.mark.parametrize("name", MODELS)
def test_training_attention_and_retention_sums(name):
    want, (tokens, segments, _, visual) = recorded(f"{name}_train"), packed(name)
    model, real = model_of(name), segments[0] > 0
    student, log_beta = decoder.forward(model, tokens, segments, visual, with_retention=True)
    teacher, _ = decoder.forward(model, tokens, segments, visual, with_retention=False)
    for got, logits in ((student, "student_logits"), (teacher, "teacher_logits")):
        assert_close(decoder.unembed(model, got[0, want["logits_at"]]), want[logits], 2e-4)
    np.testing.assert_allclose(log_beta[0][..., real], want["log_beta"][..., real], rtol=1e-4, atol=1e-7)
    mass = ops.retention_mass(log_beta.reshape(1, -1, tokens.shape[1]), jnp.asarray(segments))
    assert_close(mass[0][..., real], want["S"][..., real], 1e-4)
    budget, heads, counted = int(want["memory_size"]), mass.shape[1], np.asarray(mass)[0][:, real]
    positive = {"local": (counted > budget).sum(), "global": (counted.sum(axis=0) > budget * heads).sum()}
    for kind in KINDS:
        assert positive[kind] == want[f"npos_{kind}"][0]

"""Towers, positions and eviction of vision-language models: the public implementations' arrays on tiny models."""

import functools

import numpy as np
import pytest
from helpers import assert_close
from vision_goldens import CASES, GOLDEN, MODELS, media_of, needs_goldens, recorded

import retention_jax as rj
from retention_jax.models import vision as towers
from retention_jax.vision import prompt, sight

pytestmark = needs_goldens


@functools.cache
def model_of(name: str) -> rj.Decoder:
    return rj.load(GOLDEN / f"{name}_model", gates=GOLDEN / f"{name}_gate", dtype="float32")


@functools.cache
def prompt_of(name: str, case: str) -> prompt.Prompt:
    vision = model_of(name).config.vision
    assert vision is not None
    return prompt.assemble(recorded(f"{name}_prompts")[f"{case}/ids"], media_of(name, case), vision)


@functools.cache
def seen(name: str, what: str):
    """The tower's input for `images` or `video`, alone, and all that comes of it."""
    vision, stored = model_of(name).config.vision, recorded(f"{name}_pixels")
    assert vision is not None
    grids = tuple(tuple(g) for g in np.atleast_2d(stored[f"{what}/grid"]).tolist())
    no_text = np.zeros(0, np.int32)
    whole = prompt.Prompt(no_text, np.zeros((3, 0), np.int32), 0, no_text, stored[f"{what}/pixel_values"], grids)
    return whole, *sight.of_prompts([whole], vision)


@pytest.mark.parametrize("what", ("images", "video"))
@pytest.mark.parametrize("name", MODELS)
def test_tower(name, what):
    want, tower = recorded(f"{name}_vision"), model_of(name).vision
    whole, seen_patches, spans = seen(name, what)
    assert tower is not None
    count = len(whole.pixels)
    np.testing.assert_array_equal(seen_patches.place[0, :count], want[f"{what}/row_column"])
    starts = np.flatnonzero(np.diff(seen_patches.frames.ids[0, :count], prepend=-1, append=-1))
    np.testing.assert_array_equal(starts, want[f"{what}/cu_seqlens"])
    features, deepstack = towers.see(tower, seen_patches, spans)
    assert_close(features[0, : count // 4], want[f"{what}/merged"], 2e-4)
    assert len(deepstack) == len(want.get(f"{what}/deepstack", ()))
    embedded = towers.embed(tower, seen_patches)
    if tower.positions is not None:
        assert_close(deepstack[:, 0, : count // 4], want[f"{what}/deepstack"], 2e-4)
        at = towers.positions(tower.positions[...], seen_patches)
        assert_close(at[0, :count], want[f"{what}/pos_embed"], 1e-5)
        embedded = embedded - at
        np.testing.assert_array_equal(seen_patches.corners[0, :count], want[f"{what}/pos_index"])
        np.testing.assert_allclose(seen_patches.weights[0, :count], want[f"{what}/pos_weight"], atol=1e-5)
    assert_close(embedded[0, :count], want[f"{what}/patch_embed"], 2e-4)


def test_windows_are_those_of_the_permutation():
    want = recorded("q25_vision")
    for what in ("images", "video"):
        whole, seen_patches, _ = seen("q25", what)
        of_units = seen_patches.windows.ids[0, : len(whole.pixels) : 4][want[f"{what}/window_index"]]
        ends = np.flatnonzero(np.diff(of_units, prepend=-1, append=-1)) * 4
        np.testing.assert_array_equal(ends, want[f"{what}/cu_window_seqlens"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_log_beta(name):
    """Of all cases in one batch, padded behind."""
    want, gates = recorded(f"{name}_prompts"), recorded(f"{name}_gates")
    rows = [prompt_of(name, case) for case in CASES]
    logits, log_beta = model_of(name)(rows)
    for i, (case, row) in enumerate(zip(CASES, rows, strict=True)):
        length = len(row.tokens)
        assert_close(logits[i, :length], want[f"{case}/logits"], 2e-4)
        np.testing.assert_allclose(log_beta[i, ..., :length], gates[f"{case}/log_beta"], rtol=1e-4, atol=1e-7)


QUICK = ("q3", "mixed", "chunk16"), ("q25", "clip", "chunk16")
many = pytest.mark.slow(reason="the same at other budgets and prompts, each a program of its own")


@pytest.mark.parametrize(
    "name, case, run",
    [
        pytest.param(name, case, run, marks=() if (name, case, run) in QUICK else many)
        for name, cases in (("q3", ("two", "mixed", "turns")), ("q25", ("two", "clip")))
        for case in cases
        for run in ("b1", "b4", "chunk16", "plus_text")
    ],
)
def test_kept_sets_and_logits_of_every_step(name, case, run):
    """The budget as recorded; with it, prompts at once and in chunks that cut pictures in two, then 12 tokens."""
    gates, greedy = recorded(f"{name}_gates"), recorded(f"{name}_prompts")[f"{case}/greedy"]
    budget, recent, chunk = gates[f"{case}/{run}/budget"].tolist()
    cache = rj.CacheConfig(budget=budget, recent=recent, prefill_chunk=chunk or None)
    whole, model = prompt_of(name, case), model_of(name)
    kept = np.unpackbits(gates[f"{case}/{run}/kept"], axis=-1, count=len(whole.tokens) + 12)
    first = kept.shape[0] - 12 - 1  # the step that ends the prompt
    logits, buffer = rj.prefill(model, whole, cache)
    for step in range(first, first + 13):
        if step > first:
            logits, buffer = rj.decode(model, greedy[step - first - 1 :][:1], buffer)
        assert_close(logits[0], gates[f"{case}/{run}/logits"][step], 2e-4)
        got = [[p.tolist() for p in heads] for heads in buffer.positions(0)]
        assert got == [[np.flatnonzero(head).tolist() for head in heads] for heads in kept[step]], f"step {step}"


@many
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name):
    """Of all cases in one ragged batch, with pictures and without, at once and in chunks, with a full cache."""
    want, model = recorded(f"{name}_prompts"), model_of(name)
    rows = [prompt_of(name, case) if case != "text" else want["text/ids"].tolist() for case in CASES]
    for chunk in (None, 16):
        full = rj.CacheConfig(budget=200, recent=16, prefill_chunk=chunk)
        out = rj.generate(model, rows, full, max_new_tokens=12)
        assert out.tokens == [want[f"{case}/greedy"].tolist() for case in CASES]
    case = "two"
    got = rj.generate(model, [prompt_of(name, case)], rj.CacheConfig(budget=8, recent=1), max_new_tokens=12)
    assert got.tokens == [recorded(f"{name}_gates")[f"{case}/b1_greedy/tokens"].tolist()]

"""The costs that are read from a compiled program, against programs whose costs are known; what is made of them, on
numbers worked by hand; the command itself."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import environment_for_tpu_compiler, tiny_config

from retention_jax.config import CacheConfig, DataConfig, EvalConfig, LossConfig, TrainConfig
from retention_jax.parallel import sharding

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))
# Found by the line above, which neither linter nor type checker sees.
import chips  # noqa: E402  # pyright: ignore[reportMissingImports]
import hlo  # noqa: E402  # pyright: ignore[reportMissingImports]
import suggestions  # noqa: E402  # pyright: ignore[reportMissingImports]
import tpu_report  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.one_version

LAYERS, N = 5, 64


def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_runs():
    shapes = jax.ShapeDtypeStruct((N, N), jnp.float32), jax.ShapeDtypeStruct((LAYERS, N, N), jnp.float32)
    cost = hlo.cost(jax.jit(layers).lower(*shapes).compile().as_text() or "")
    assert cost.flops == LAYERS * 2 * N**3
    assert cost.unknown_loops == 0 and cost.collectives == []
    # Each step reads a layer's weights, not all layers', and x, which it writes; the compiler may copy some of these.
    least = LAYERS * 3 * 4 * N**2
    assert least <= cost.bytes <= 4 * least


def test_loops_of_unknown_length_are_told_unless_somebody_says_how_long_they_are():
    def halve(x):
        with jax.named_scope("halving"):
            return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: jnp.tanh(x @ x), x)

    text = jax.jit(halve).lower(jax.ShapeDtypeStruct((N, N), jnp.float32)).compile().as_text() or ""
    once, never, thrice = (hlo.cost(text, trips) for trips in ({}, {"halving": 0}, {"halving": 3}))
    assert [c.unknown_loops for c in (once, never, thrice)] == [1, 0, 0]
    assert [c.flops for c in (once, never, thrice)] == [2 * N**3, 0, 6 * N**3]
    assert hlo.combined((1, thrice), (-2, once)).flops == 2 * N**3


def test_the_branch_of_a_conditional_that_moves_least_counts():
    def either(which, x):
        return jax.lax.cond(which, lambda x: jnp.tanh(jnp.tanh(x @ x) @ x) @ x, lambda x: x @ x, x)

    shapes = jax.ShapeDtypeStruct((), jnp.bool_), jax.ShapeDtypeStruct((N, N), jnp.float32)
    text = jax.jit(either).lower(*shapes).compile().as_text() or ""
    assert " conditional(" in text
    assert hlo.cost(text).flops == 2 * N**3


COMBINED = """
ENTRY %main (a: f32[2,9], b: bf16[30]) -> (f32[8,9], bf16[120]) {
  %a = f32[2,9]{1,0} parameter(0)
  %b = bf16[30]{0} parameter(1)
  %g = ((f32[2,9]{1,0}, bf16[30]{0}), (f32[8,9]{1,0:T(8,128)}, bf16[120]{0})) all-gather-start(%a, %b), GROUPS
  %p = (f32[2,9]{1,0}, f32[2,9]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %r = (f32[2,9]{1,0}, bf16[30]{0}) all-reduce-start(%a, %b), GROUPS, to_apply=%add
  ROOT %done = (f32[8,9]{1,0}, bf16[120]{0}) all-gather-done(%g)
}
""".replace("GROUPS", "replica_groups=[1,4]<=[4]")


def test_collectives_that_the_compiler_combined_count_with_all_their_arrays():
    found = {c.kind: c.sent for c in hlo.cost(COMBINED).collectives}
    gathered, reduced = 4 * 8 * 9 + 2 * 120, 4 * 2 * 9 + 2 * 30
    assert found == {
        "all-gather": gathered * 3 / 4,
        "collective-permute": 4 * 2 * 9,
        "all-reduce": 2 * reduced * 3 / 4,
    }


MOVED = """
%slicing (p: f32[9,8]) -> f32[2,8] {
  %p = f32[9,8]{1,0} parameter(0)
  ROOT %s = f32[2,8]{1,0:S(1)} slice(%p), slice={[0:2], [0:8]}
}

ENTRY %main (a: f32[9,8]) -> f32[9,8] {
  %a = f32[9,8]{1,0} parameter(0)
  %copying = (f32[9,8]{1,0:S(1)}, f32[9,8]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copied = f32[9,8]{1,0:S(1)} copy-done(%copying)
  %slicing_it = ((f32[9,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%slicing
  %sliced = f32[2,8]{1,0:S(1)} async-done(%slicing_it)
  %again = f32[3,8]{1,0:S(1)} slice(%copied), slice={[0:3], [0:8]}
  ROOT %put = f32[9,8]{1,0} dynamic-update-slice(%a, %again)
}
"""


def test_what_goes_on_the_chip_is_read_once_and_what_stays_there_is_free():
    whole, two, three = (4 * 8 * rows for rows in (9, 2, 3))
    assert hlo.cost(MOVED).bytes == whole + two + three  # into on-chip memory; a part of it; back into HBM


def test_collectives_are_counted_with_their_bytes():
    mesh = sharding.make_mesh(fsdp=8)
    place = lambda *spec: jax.sharding.NamedSharding(mesh, sharding.P(*spec))
    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=place())
    w = jax.ShapeDtypeStruct((LAYERS, N, N), jnp.float32, sharding=place(None, "fsdp", None))

    def gathering(x, weights):
        whole = lambda w: jax.lax.with_sharding_constraint(w, place())
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, weights)[0]

    (found,) = hlo.cost(jax.jit(gathering).lower(x, w).compile().as_text() or "").collectives
    # On a ring each device passes on 7 of the 8 parts.
    assert found == hlo.Collective("all-gather", 8, LAYERS, LAYERS * 4 * N**2 * 7 / 8)


def test_collectives_that_share_a_channel_are_all_counted():
    mesh = sharding.make_mesh(fsdp=8)

    def mapped(x):
        step = lambda x, _: (jax.lax.psum(x - jax.lax.pmax(x, "fsdp"), "fsdp"), None)
        return jax.lax.scan(step, x, length=LAYERS)[0]

    with jax.set_mesh(mesh):
        spec = sharding.P("fsdp")
        program = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        text = program.lower(jax.ShapeDtypeStruct((8 * N, N), jnp.float32)).compile().as_text() or ""
    assert len(set(re.findall(r"channel_id=\d+", text))) == 1
    times, sent = 2 * LAYERS, 2 * 4 * N**2 * 7 / 8
    assert hlo.cost(text).collectives == [hlo.Collective("all-reduce", 8, times, times * sent)]


def part(what, times, flops=0.0, nbytes=0.0, sent=0.0):
    return tpu_report.Part(what, times, hlo.Cost(flops, nbytes, [hlo.Collective("all-reduce", 2, 3, sent)], 0))


CHIP = chips.Chip(flops=100.0, bandwidth=10.0, memory=1000.0, ici=1.0, devices=2)


def of_decoding(**fields):
    """Ten steps of 3 s (HBM), and an eviction of 20 s (ICI), on four devices."""
    parts = [part("a step", 10, flops=100.0, nbytes=30.0, sent=2.0), part("an eviction", 1, nbytes=100.0, sent=20.0)]
    sizes = {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}
    told = {"mesh": sizes, "chips": 2, "tokens": 200, "bytes": {"weights": 2**30, "buffer": 2**29}, "memory": 2**31}
    told |= {"fits": True, "assumed": "much", "unknown_loops": 0, "compile_seconds": 7.0}
    return told | tpu_report.of_parts(parts, CHIP) | fields


def test_a_time_is_the_sum_over_parts_of_what_is_slowest_in_each(capsys):
    told = of_decoding()
    assert told["seconds"] == 10 * 3.0 + 20.0 and told["bound_by"] == "HBM"
    # Two chips at 36 dollars an hour, 0.02 a second together: 1 dollar for 200 tokens.
    assert tpu_report.dollars_per_million_tokens(told, 36.0) == pytest.approx(5000.0)
    tpu_report.show(told, 36.0)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "data 2, fsdp 1, context 1, tensor 2 (2 chips, 4 devices), bytes a device:",
        "all, of 2.00 GiB 1.50 GiB fits",
        "a step: 10 times, 60.0 % of the time; on a device",
        "an eviction: 40.0 % of the time; on a device",
        "at the chip's peaks: compute 0 s, HBM 10 s, ICI 20 s: at least 20 s",
        "assumed: much",
        "at least 50 s for all of it, bound by HBM",
        "at most 4 tokens/s, 2 a chip; at least $5000.0000 a million tokens; compiled in 7 s",
    ):
        assert line in lines


def test_a_chip_of_two_devices_has_one_price():
    assert chips.of_topology("tpu7x:2x2x1").devices == 2 and chips.of_topology("v5p:2x2x1").devices == 1


def test_a_refusal_says_how_much_was_wanted(capsys):
    refused = tpu_report.refusal("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.")
    assert refused == {"fits": False, "wanted": 20.5 * 2**30, "why": "Used 20.50G of 15.75G hbm"}
    silent = tpu_report.refusal("RESOURCE_EXHAUSTED: full\nmore")
    assert silent == {"fits": False, "wanted": None, "why": "RESOURCE_EXHAUSTED: full"}
    tpu_report.show(of_decoding() | refused, None)
    assert capsys.readouterr().out.endswith("  DOES NOT FIT: Used 20.50G of 15.75G hbm\n")


def set_up(program="train", batch=8, **sizes):
    config = TrainConfig(
        stage="gates",
        backbone="builtin:recall",
        data=DataConfig(task="recall", length=64, batch_size=batch, document_lengths=(64,)),
        eval=EvalConfig(tasks=()),
        loss=LossConfig(vocab_block=512),
        remat=True,
    )
    kept = CacheConfig(budget=8, recent=4, prefill_chunk=16)
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    return suggestions.Setup(program, config, tiny_config(num_heads=4, num_kv_heads=2), sizes, kept)


def test_changes_that_take_less_memory():
    texts = lambda setup: [change.text for change in suggestions.smaller(setup)]
    half = ["mesh context 2 and half the batch", "mesh tensor 2 and half the batch", "batch 4"]
    assert texts(set_up(data=2, fsdp=2)) == ["mesh fsdp 4 in place of data 2", "optimizer.accumulation=2", *half]
    plain = set_up(fsdp=8)  # a row a device: neither a smaller batch nor accumulation
    assert texts(plain) == half[:2]
    loss = dataclasses.replace(plain.config.loss, vocab_block=1024)
    assert texts(suggestions.with_config(plain, remat=False, loss=loss)) == [
        "remat=True",
        "loss.vocab_block=512",
        *half[:2],
    ]
    assert texts(set_up("decode", data=2, tensor=4)) == ["mesh tensor 8", "batch 4"]
    assert texts(set_up("prefill", batch=1)) == ["prefill_chunk 8"]
    assert texts(set_up(batch=1)) == []
    (moved, *_) = suggestions.smaller(set_up("decode", data=2, tensor=4))
    assert moved.setup.sizes == {"data": 1, "fsdp": 1, "context": 1, "tensor": 8}


def test_changes_that_use_what_is_free():
    texts = lambda setup, told: [change.text for change in suggestions.larger(setup, told)]
    held = {"weights": 300, "gates": 50, "optimiser": 50, "activations and temporaries": 100}
    told = {"bytes": held, "memory": 1000, "bound_by": "compute"}
    # 600 beside what does not grow: six batches, so four of them. Without remat two layers of 64 tokens want more.
    assert texts(set_up(), told) == ["batch 32"]
    assert texts(set_up(), told | {"bytes": held | {"weights": 750}}) == []
    assert texts(set_up(fsdp=4), told | {"bound_by": "ICI"}) == ["batch 32", "mesh data 2, fsdp 2"]
    # A token and layer: 2 * 32 + 2 * 16 + 3 * 24 + 3 * 16 float32 numbers, 216; two layers, 8 * 64 tokens.
    enough = 400 + 100 + 2 * 8 * 64 * 216 * 4
    assert texts(set_up(), told | {"memory": enough})[1:] == []
    assert texts(set_up(), told | {"memory": enough + 1})[1:] == ["remat=False"]


def searched(setup, wanted, room):
    """All changes that a search tries on a made-up compiler, which wants `wanted(setup)` bytes of `room`."""

    def compiled(setup):
        needs = wanted(setup)
        if needs > room:
            return {"fits": False, "wanted": needs}
        held = {"activations and temporaries": needs}
        return {"fits": True, "bytes": held, "memory": room, "bound_by": "HBM", "tokens": setup.batch, "seconds": 1.0}

    told = compiled(setup)
    reports = [told, *suggestions.search(setup, told, compiled)]
    return [report["change"] for report in reports[1:]], suggestions.advice(reports)


def test_changes_are_joined_where_none_is_enough():
    of_batch = lambda s: s.batch / s.rows * 100 / s.config.optimizer.accumulation
    first = ["optimizer.accumulation=2", "batch 4"]
    assert searched(set_up(), of_batch, 400) == (first[:1], "suggestion: optimizer.accumulation=2, at most 8 tokens/s")
    tried, advice = searched(set_up(), of_batch, 200)
    assert tried == [*first, "optimizer.accumulation=2, optimizer.accumulation=4"]
    assert advice == "suggestion: optimizer.accumulation=2, optimizer.accumulation=4, at most 8 tokens/s"
    assert searched(set_up(), lambda s: 500, 200) == (first, "nothing that was tried fits")
    assert searched(set_up(), of_batch, 3200) == (["batch 32"], "suggestion: batch 32, at most 32 tokens/s")
    assert searched(set_up(), of_batch, 900) == ([], "suggestion: none, no memory is left to use")


@pytest.mark.slow  # compiles a training step for TPU
def test_the_command(tmp_path):
    pytest.importorskip("libtpu")
    output = tmp_path / "report.json"
    command = [sys.executable, LAUNCH / "compile_for_tpu.py", "--config=configs/recall_backbone.py", "--nosuggest"]
    command += ["--topology=v5e:2x2", "--mesh=data:2,tensor:2", "--program=decode", "--batch=8", f"--output={output}"]
    command += ["--budget=64", "--recent=16", "--price_per_chip_hour=1.2"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment_for_tpu_compiler(), cwd=LAUNCH.parent)
    assert run.returncode == 0, run.stderr[-4000:]
    (report,) = json.loads(output.read_text())
    assert report["fits"] and report["tokens"] == 8 * 16 and report["unknown_loops"] == 0
    assert "fits" in run.stdout and "a million tokens" in run.stdout
    assert all(report["bytes"][kind] > 0 for kind in ("weights", "gates", "buffer", "activations and temporaries"))
    step, eviction = report["parts"]
    assert step["flops"] > 0 and 0 < eviction["hbm_bytes"]
    # Slot shards add their counts up in each of the 32 passes of a search, and around the three searches; all devices
    # agree whether there is anything to search for.
    times = {c["devices"]: c["count"] for c in eviction["collectives"] if c["kind"] == "all-reduce"}
    assert times == {2: 32 + 3, 4: 3}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--mesh=data:3", "must multiply to the 4 devices"),
        (
            "--mesh=rows:4",
            "--mesh must be as in data:2,fsdp:4, each of the axes .* at most once; got 'rows:4'",
        ),
        ("--model=gpt5", "no architecture is known for 'gpt5'"),
    ],
)
def test_refusals(flag, message):
    pytest.importorskip("libtpu")
    command = [sys.executable, LAUNCH / "compile_for_tpu.py", "--config=configs/recall_backbone.py", flag]
    run = subprocess.run(
        [*command, "--topology=v5e:2x2"],
        capture_output=True,
        text=True,
        env=environment_for_tpu_compiler(),
        cwd=LAUNCH.parent,
    )
    assert run.returncode == 2 and re.search(message, run.stderr), run.stderr[-2000:]

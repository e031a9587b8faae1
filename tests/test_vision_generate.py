"""Prompts with pictures from arrays, messages, files and conversations; checkpoints in every layout; refusals."""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, same, tiny_model
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_generate_command import command
from test_vision_model import model_of, prompt_of
from vision_goldens import GOLDEN, MODELS, needs_goldens, processor_of, recorded

import retention_jax as rj
from retention_jax.generation import conversation, prompt_files
from retention_jax.generation.conversation import Conversation, Writer
from retention_jax.models import decoder, huggingface
from retention_jax.models.inputs import ids_of
from retention_jax.parallel import sharding
from retention_jax.text import tokenizer
from retention_jax.vision import prompt

pytestmark = [needs_goldens, pytest.mark.one_version]
ROOMY = rj.CacheConfig(budget=400, recent=8, prefill_chunk=16)


def processed(name: str) -> dict[str, np.ndarray]:
    """Case `mixed`, a clip and picture 2, as a processor of transformers returns it."""
    stored, grids = recorded(f"{name}_pixels"), recorded(f"{name}_pixels")["images/grid"]
    first = grids[:2].prod(axis=1).sum()
    found = {
        "input_ids": recorded(f"{name}_prompts")["mixed/ids"][None],
        "pixel_values": stored["images/pixel_values"][first:],
        "image_grid_thw": grids[2:],
        "pixel_values_videos": stored["video/pixel_values"],
        "video_grid_thw": stored["video/grid"],
    }
    return found if name == "q3" else {**found, "second_per_grid_ts": np.array([5.2])}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_processor_returns(name):
    model, given, want = model_of(name), processed(name), prompt_of(name, "mixed")
    for got in (rj.inputs(model, **given), *rj.inputs(model, [given, given])):  # pyright: ignore
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pixel_values": None, "image_grid_thw": None}, "8 image placeholders, but 0 features of 0 images"),
        (
            {"image_grid_thw": [[1, 4, 4]]},
            r"the 16 patches that image_grid_thw says, of 1536 numbers, got \[32, 1536\]",
        ),
        ({"pixels": 1}, "fields are input_ids and perhaps .* got input_ids, .*pixels"),
        ({"input_ids": [[1, 2], [3, 4]]}, r"\[T\] or \[1, T\], got int64 \[2, 2\]"),
    ],
)
def test_wrong_arrays(changes, message):
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        rj.inputs(model_of("q3"), [processed("q3"), {**processed("q3"), **changes}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its gates in `gates`, two pictures and a folder of frames."""
    folder = tmp_path_factory.mktemp("checkpoint") / "q3"
    shutil.copytree(GOLDEN / "q3_model", folder)
    shutil.copytree(GOLDEN / "q3_gate", folder / "gates")
    for i, picture in enumerate(pictures(2)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    stored = recorded("q3_pixels")
    for i, frame in enumerate(stored["video/frames"]):
        Image.fromarray(frame).save(folder / f"frame{i}.png")
    listed = [{"file": f"frame{i}.png", "index": int(n)} for i, n in enumerate(stored["video/indices"])]
    (folder / "frames.json").write_text(json.dumps({"fps": 25, "total_frames": 325, "frames": listed}))
    return folder


def pictures(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (70, 90, 3)).astype(np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def writer():
    return Writer(
        model=model_of("q3"),
        tokenizer=tokenizer.load(GOLDEN / "q3_model"),
        cache=ROOMY,
        max_new_tokens=5,
        drawing={"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        seed=0,
        template=True,
        system="",
        template_kwargs={},
        processor=processor_of("q3"),
    )


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_messages_of_a_folder(folder):
    """A folder of frames, in the goldens' words: their tokens, positions and pixels."""
    content = [{"type": "video", "video": folder}, text("What happens in the clip?")]
    got, want = rj.read_messages(folder, [{"role": "user", "content": content}]), prompt_of("q3", "clip")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
    plain = rj.read_messages(folder, [{"role": "user", "content": "Name a river in the north."}])
    np.testing.assert_array_equal(plain.tokens, recorded("q3_prompts")["text/ids"])


@pytest.mark.slow  # many programs; the next test has turns too
def test_three_turns_with_pictures_are_one_text(writer):
    """Turn by turn, each with a new picture, on one buffer; and all at once, where nothing is evicted."""
    model, vision = writer.model, writer.model.config.vision
    assert vision is not None
    before, read, media = Conversation(), [], []
    for turn, picture in enumerate(pictures(3)):
        content = [text(f"Look {turn} "), {"type": "image", "image": picture}, text("?")]
        messages, tokens = conversation.turn_tokens(writer, before, content)
        assert isinstance(tokens, prompt.Prompt)
        read += tokens.tokens.tolist()
        media.append(prompt.Patches(tokens.pixels, tokens.grids[0], [], 0.0))
        if turn < 2:
            said = conversation.reply(writer, tokens, lambda _: None, seed=0, buffer=before.buffer)
            read += said.tokens[:-1]
            messages = [*messages, {"role": "assistant", "content": writer.tokenizer.decode(said.tokens)}]
            before = Conversation(messages, said.tokens[-1], said.buffer)
    logits, buffer = rj.prefill(model, tokens, ROOMY, buffer=before.buffer)
    whole = prompt.assemble(read, media, vision)
    want_logits, want = rj.prefill(model, whole, dataclasses.replace(ROOMY, prefill_chunk=None))
    assert_close(logits, want_logits, 1e-4)
    assert int(buffer.seen[0]) == len(read)
    for held in (buffer, want):
        np.testing.assert_array_equal(np.asarray(held.shift), [whole.next_shift])
    assert same(buffer.positions(0), want.positions(0))


def test_a_conversation_by_lines(writer, folder, capsys):
    lines = [f"/image {folder}/0.png", "What?", "/image nowhere.png", "And this?", f"/video {folder}", "And that?"]
    written: list[str] = []
    totals = conversation.converse(writer, lines, written.append)
    assert "nowhere.png: cannot be read as a picture" in capsys.readouterr().err
    _, tokens = conversation.turn_tokens(
        writer, Conversation(), [{"type": "image", "image": folder / "0.png"}, text("What?")]
    )
    first = conversation.reply(writer, tokens, lambda _: None, seed=0)
    assert "".join(written).startswith(writer.tokenizer.decode(first.tokens) + "\n")
    assert totals.prompt_tokens > len(ids_of(tokens)) + 36  # the clip's features are read in the second turn


@pytest.mark.slow  # three programs of a whole command; the tests above show its parts
def test_the_command(folder, writer, tmp_path, capsys):
    shown = [f"--image={folder}/0.png", f"--image={folder}/1.png"]
    command(folder, *shown, "--prompt=Which?", "--budget=400")
    parts = [{"type": "image", "image": f"{folder}/{i}.png"} for i in (0, 1)]
    message = {"role": "user", "content": [*parts, text("Which?")]}
    tokens = conversation.prompt_tokens(writer, [message])
    want = rj.generate(
        writer.model, [tokens], writer.cache, max_new_tokens=6, stop_tokens=writer.tokenizer.stop_tokens
    ).tokens[0]
    assert capsys.readouterr().out == writer.tokenizer.decode(want) + "\n"
    (tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps({"messages": [m]}) for m in (message, {**message, "content": "Hm?"}))
    )
    command(folder, f"--prompts={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl", "--budget=400")
    results = {r["index"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert results[0]["output"] == writer.tokenizer.decode(want) and results[0]["prompt_tokens"] == len(ids_of(tokens))
    for arguments, told in (
        (("--prompt=a", "--raw", *shown), "--raw leaves out"),
        (("--prompts=a", "--output=b", *shown), "go with --prompt or --chat"),
    ):
        with pytest.raises(ValueError, match=told):
            command(folder, *arguments)


def test_a_parked_conversation_goes_on_at_its_positions(tmp_path):
    """After a picture RoPE's next position is not the number of tokens; a file keeps it."""
    model, whole = model_of("q3"), prompt_of("q3", "one")
    _, buffer = rj.prefill(model, whole, ROOMY)
    rj.save_buffer(buffer, 0, tmp_path / "row")
    again = rj.load_buffer(model, tmp_path / "row")
    np.testing.assert_array_equal(np.asarray(again.shift), [whole.next_shift])
    token = np.array([7], np.int32)
    (want, _), (got, _) = rj.decode(model, token, buffer), rj.decode(model, token, again)
    np.testing.assert_array_equal(got, want)


def test_bad_lines_with_pictures_are_named(writer, tmp_path):
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="line 1: message 0, part 0: nowhere.png: cannot be read as a picture"):
        prompt_files.read_prompts(writer, tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match="no vision tower"):
        prompt_files.read_prompts(writer._replace(processor=None), tmp_path / "in.jsonl")


# Checkpoints.


@pytest.mark.parametrize("name", MODELS)
def test_written_folders_are_read_again(name, tmp_path):
    """Backbone and gates come back equal, under the published names."""
    model = model_of(name)
    rj.save_backbone(model, tmp_path / "model")
    rj.save_gates(model, tmp_path / "gates")
    again = rj.load(tmp_path / "model", gates=tmp_path / "gates", dtype="float32")
    assert again.config == model.config and same(again, model)
    for ours, theirs in (("model/model", f"{name}_model/model"), ("gates/gates", f"{name}_gate/gates")):
        names = []
        for file in (tmp_path / ours, GOLDEN / theirs):
            with safe_open(file.with_suffix(".safetensors"), "numpy") as tensors:
                names.append(set(tensors.keys()))
        assert names[0] == names[1]
    fields = json.loads((tmp_path / "gates" / "config.json").read_text())
    assert fields["text_config"]["retention_gate"] == "rg10" and "retention_gate" not in fields


@pytest.mark.parametrize("name", MODELS)
def test_the_other_layout(name, tmp_path):
    """config.json of transformers 5, and tensors under the prefixes of the other family; and both at once."""
    shutil.copy(GOLDEN / f"{name}_model" / "config_transformers5.json", tmp_path / "config.json")
    swap = {"model.language_model.": "model.", "model.visual.": "visual."}
    found = load_file(GOLDEN / f"{name}_model" / "model.safetensors")
    if name == "q25":
        swap = {"model.": "model.language_model.", "visual.": "model.visual."}
    renamed = {}
    for key, value in found.items():
        old = next((old for old in swap if key.startswith(old)), "")
        renamed[swap.get(old, "") + key.removeprefix(old)] = value
    save_file(renamed, tmp_path / "model.safetensors")
    gates = tmp_path / "gates"
    gates.mkdir()
    for file in ("config.json", "trimkv_weights.pth"):  # the released format
        shutil.copy(GOLDEN / f"{name}_gate" / file, gates)
    again = rj.load(tmp_path, gates=gates, dtype="float32")
    assert again.config == model_of(name).config and same(again, model_of(name))


def edited(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A golden config.json with fields, named by their path, set to other values; None removes one."""
    raw = json.loads((GOLDEN / f"{name}_model" / "config.json").read_text())
    for path, value in changes.items():
        *outer, last = path.split(".")
        at = raw
        for part in outer:
            at = at[part]
        at.pop(last) if value is None else at.update({last: value})
    return raw


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("q3", {"model_type": "qwen3_vl_moe"}, "model_type 'qwen3_vl_moe'.*qwen3_vl, qwen2_5_vl"),
        ("q3", {"vision_config": None}, "vision_config and text_config must be objects"),
        (
            "q3",
            {"image_token_id": None, "vision_config.depth": None},
            "image_token_id is missing; vision_config.depth is",
        ),
        ("q3", {"text_config.rope_scaling.rope_type": "yarn"}, "M-RoPE together with 'yarn'"),
        ("q3", {"text_config.rope_scaling.mrope_section": [4, 2, 1]}, r"sum to head_size / 2 = 8, got \(4, 2, 1\)"),
        ("q3", {"text_config.rope_scaling.mrope_section": None}, "mrope_section must be a list"),
        ("q3", {"text_config.rope_scaling.mrope_interleaved": False}, "mrope_interleaved False"),
        ("q3", {"text_config.partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("q3", {"vision_config.deepstack_visual_indexes": [0, 1, 4]}, "deepstack must be ascending indices below 4"),
        ("q3", {"text_config.num_hidden_layers": 2}, "deepstack must not have more than the 2 layers"),
        ("q3", {"vision_config.out_hidden_size": 32}, "out_width must be the width 64, got 32"),
        ("q3", {"vision_config.num_position_embeddings": 63}, "must be a square number"),
        ("q3", {"vision_config.hidden_act": "gelu"}, "vision_config.hidden_act 'gelu'"),
        ("q3", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("q3", {"vision_config.quantization_config": {"bits": 4}}, "vision_config.quantization_config"),
        ("q25", {"vision_config.window_size": 50}, "window must be a multiple of patch . merge = 28, got 50"),
        ("q25", {"vision_config.spatial_patch_size": 7}, "vision_config.spatial_patch_size 7"),
        ("q25", {"model_type": "llava"}, "model_type 'llava'"),
    ],
)
def test_configs_that_are_not_done_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        huggingface.model_config(edited(name, changes), "float32", where="config.json")


def test_a_text_model_refuses_pictures(tmp_path):
    with pytest.raises(ValueError, match="the prompt has pictures, but the model has no vision tower"):
        rj.generate(tiny_model(vocab_size=400), [prompt_of("q3", "one")], ROOMY, max_new_tokens=1)
    with pytest.raises(ValueError, match="the model has no vision tower, but there are pixel_values"):
        rj.inputs(tiny_model(), input_ids=[1], pixel_values=np.zeros((4, 1536)))


# Programs.


def test_text_costs_nothing_more_where_a_model_sees():
    """The same program as without tower and M-RoPE: nothing of them is in it."""
    sees, tokens = model_of("q3"), np.zeros((1, 8), np.int32)
    text_alone = dataclasses.replace(sees.config, vision=None, mrope=None)
    blind = nnx.eval_shape(lambda: rj.Decoder(text_alone, sees.gate_config, rngs=nnx.Rngs(0)))
    programs = [decoder._score.lower(model, tokens, None).as_text() for model in (sees, blind)]
    assert programs[0] == programs[1]


@pytest.mark.slow  # programs for eight devices
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [dict(data=2, context=2, tensor=2), dict(fsdp=2, tensor=4)], ids=str)
def test_on_a_mesh(name, sizes):
    """Logits, kept sets and tokens of a ragged batch, the tower's weights shared out too."""
    case, mesh = ("mixed", "two") if name == "q3" else ("clip", "two"), sharding.make_mesh(**sizes)
    gates = recorded(f"{name}_gates")
    rows = [prompt_of(name, c) for c in case]
    model = rj.load(GOLDEN / f"{name}_model", GOLDEN / f"{name}_gate", "float32", mesh=mesh)
    logits, _ = model(rows)
    for i, c in enumerate(case):
        assert_close(np.asarray(logits)[i, : len(rows[i].tokens)], recorded(f"{name}_prompts")[f"{c}/logits"], 2e-4)
    _, buffer = rj.prefill(model, rows, rj.CacheConfig(budget=8, recent=1, prefill_chunk=16))
    for i, c in enumerate(case):
        steps = -(-len(rows[i].tokens) // 16)
        kept = np.unpackbits(gates[f"{c}/chunk16/kept"][steps - 1], axis=-1, count=len(rows[i].tokens) + 12)
        got = [[p.tolist() for p in heads] for heads in buffer.positions(i)]
        assert got == [[np.flatnonzero(head).tolist() for head in heads] for heads in kept]
    out = rj.generate(model, rows, dataclasses.replace(ROOMY, budget=200), max_new_tokens=12)
    assert out.tokens == [recorded(f"{name}_prompts")[f"{c}/greedy"].tolist() for c in case]

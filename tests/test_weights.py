"""Checkpoint folders: what is written comes back bit for bit, and what does not fit is named."""

import itertools
import json
import math
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config, tiny_model
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from retention_jax.config import GateConfig, RopeScaling
from retention_jax.models import gate_files, huggingface, weights
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam

LONG = RopeScaling(
    "longrope",
    original_length=8,
    attention_factor=1.5,
    short_factor=(1.0, 1.5, 2.0, 3.0),
    long_factor=(1.0, 2.0, 4.0, 8.0),
)
GATES = [
    GateConfig(width=8),
    GateConfig(width=8, tie_offset=False),
    GateConfig(width=8, share="layers_and_heads"),
    GateConfig(width=8, share="none"),
    GateConfig(width=8, hidden_layers=1, share="none"),
]
FAMILIES = (
    dict(qk_norm=True, sliding_window=3, sliding_layers=(1,), rope_scaling=RopeScaling("linear", factor=2.0)),  # Qwen3
    dict(qkv_bias=True, rope_scaling=RopeScaling("yarn", factor=4.0, original_length=8, attention_factor=1.2)),  # Qwen2
    dict(qkv_bias=True, output_bias=True, mlp_bias=True),  # Llama
    dict(rope_scaling=RopeScaling("llama3", factor=8.0, original_length=8)),  # Llama
    dict(sliding_window=3, sliding_layers=(0, 1), rope_scaling=LONG),  # Mistral
)


def assert_same(got: Decoder, want: Decoder, kind: type[nnx.Variable]) -> None:
    """Bit for bit, under the same names."""
    states = [nnx.to_flat_state(nnx.state(model, kind)) for model in (got, want)]
    assert [path for path, _ in states[0]] == [path for path, _ in states[1]]
    for (path, a), (_, b) in zip(*states, strict=True):
        assert a.dtype == b.dtype and np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes(), path


@pytest.fixture
def folders(tmp_path):
    """A saved backbone, its saved gates."""
    model = tiny_model(GATES[0])
    weights.save_backbone(model, tmp_path / "backbone")
    gate_files.save_gates(model, tmp_path / "gates")
    return tmp_path / "backbone", tmp_path / "gates"


def edit_json(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize("family, tied", list(itertools.product(FAMILIES, (False, True))))
def test_backbones_come_back(tmp_path, monkeypatch, family, tied):
    monkeypatch.setattr(weights, "init_gates", lambda model, *, seed, mesh=None: None)  # not looked at here
    dtype = "bfloat16" if tied else "float32"
    model = tiny_model(GATES[0], tie_embeddings=tied, dtype=dtype, **family)
    weights.save_backbone(model, tmp_path)
    loaded = weights.load_backbone(tmp_path, GATES[0], dtype, seed=0)
    assert loaded.config == model.config
    assert_same(loaded, model, nnx.Param)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates_come_back(tmp_path, gate):
    model = tiny_model(gate, seed=1)
    weights.save_backbone(model, tmp_path)
    gate_files.save_gates(model, tmp_path / "gates")
    loaded = weights.load(tmp_path, tmp_path / "gates", "float32")
    assert loaded.gate_config == gate
    assert_same(loaded, model, GateParam)
    assert_same(loaded, model, nnx.Param)


def test_fresh_gates_forget_next_to_nothing(folders):
    model = weights.load(folders[0], dtype="float32")
    _, log_beta = jax.eval_shape(model, np.zeros((1, 3), np.int32))
    assert log_beta.shape == (1, 2, 2, 3)
    np.testing.assert_array_equal(model.final_projection.offset[...], 18.0)
    for _, gate in nnx.to_flat_state(nnx.state(model, GateParam)):
        assert gate.dtype == np.float32


def test_dtypes_convert_on_the_way_in(folders):
    model = weights.load(*folders, dtype="bfloat16")
    want = load_file(folders[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert model.embedding.dtype == "bfloat16" and model.config.dtype == "bfloat16"
    np.testing.assert_array_equal(model.embedding[...], want.astype(model.embedding.dtype))
    assert model.final_projection.weight.dtype == np.float32


def test_file_layout_is_transformers(folders):
    # Linear layers are [outputs, inputs], heads one after the other.
    model = tiny_model(GATES[0])
    tensors = load_file(folders[0] / "model.safetensors")
    q, o = (np.asarray(w[...])[1] for w in (model.layers.q, model.layers.o))
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], q.reshape(16, 32).T)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.o_proj.weight"], o.reshape(32, 16).T)
    shapes = {
        name.split("retention_gate.")[1]: a.shape for name, a in load_file(folders[1] / "gates.safetensors").items()
    }
    assert shapes == {
        "linear1.weight": (8, 16),
        "linear1.bias": (8,),
        "linear2.weight": (8, 8),
        "linear2.bias": (8,),
        "linear3.weight": (2, 8),
        "bias": (2,),
    }


def test_every_tensor_that_does_not_fit_is_listed(folders):
    file = folders[0] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ascontiguousarray(tensors["model.layers.0.mlp.up_proj.weight"].T)
    del tensors["lm_head.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors | {"model.layers.2.what": np.zeros(3, np.float32), "extra": np.zeros(1, np.float32)}, file)
    with pytest.raises(ValueError) as error:
        weights.load(*folders, dtype="float32")
    for part in (
        str(folders[0]),
        "missing lm_head.weight",
        "missing model.layers.1.self_attn.k_proj.weight",
        "unexpected model.layers.2.what",
        "unexpected extra",
        "model.norm.weight has shape (5,), needed (16,)",
        "model.layers.0.mlp.up_proj.weight has shape (16, 24), needed (24, 16)",
    ):
        assert part in str(error.value)


def test_a_tied_head_may_be_written_out(tmp_path):
    model = tiny_model(GATES[0], tie_embeddings=True)
    weights.save_backbone(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert_same(weights.load_backbone(tmp_path, GATES[0], "float32", seed=0), model, nnx.Param)


def test_a_stored_head_that_differs_from_its_embedding_is_kept(tmp_path, caplog):
    model = tiny_model(GATES[0], tie_embeddings=True)
    weights.save_backbone(model, tmp_path)
    file = tmp_path / "model.safetensors"
    head = load_file(file)["model.embed_tokens.weight"] + 1
    save_file(load_file(file) | {"lm_head.weight": head}, file)
    with caplog.at_level("WARNING", logger="absl"):
        loaded = weights.load_backbone(tmp_path, GATES[0], "float32", seed=0)
    assert "lm_head.weight differs" in caplog.text and not loaded.config.tie_embeddings
    assert loaded.lm_head is not None
    np.testing.assert_array_equal(loaded.lm_head[...], head)


def test_a_wrong_prefix_is_told_in_few_words(folders):
    file = folders[0] / "model.safetensors"
    save_file({f"language_model.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(
        ValueError, match="(?s)missing model.*and [0-9]+ more.*unexpected language_model.*more"
    ) as error:
        weights.load(*folders, dtype="float32")
    assert len(str(error.value)) < 2500


def test_messages_have_the_names_of_config_json(folders):
    path = folders[0] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": "small"}))
    with pytest.raises(ValueError, match=r"config.json: rms_norm_eps must be a number, got 'small'"):
        weights.load(folders[0])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dtype must be one of 'float32'.*got 'float16'"):
        weights.load(folders[0], dtype="float16")


@pytest.mark.parametrize("which, share", list(itertools.product((0, 1), (0.0, 0.001, 0.5, 0.999))))
def test_a_truncated_file_is_refused(folders, which, share):
    file = folders[which] / ("model.safetensors", "gates.safetensors")[which]
    whole = file.read_bytes()
    file.write_bytes(whole[: math.floor(len(whole) * share)])
    with pytest.raises(ValueError, match=f"{file.name}: not a complete safetensors file"):
        weights.load(*folders, dtype="float32")


@pytest.mark.parametrize("which", (0, 1))
def test_a_config_must_be_there_and_be_json(folders, which):
    path = folders[which] / "config.json"
    for text, message in (('{"gate": {', "not valid JSON"), ("\x00", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            weights.load(*folders, dtype="float32")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{path}: not valid JSON"):
        weights.load(*folders, dtype="float32")
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}: no such file"):
        weights.load(*folders, dtype="float32")


def test_missing_files_are_named(folders, tmp_path):
    (folders[1] / "gates.safetensors").unlink()
    with pytest.raises(ValueError, match="gates.safetensors"):
        weights.load(*folders, dtype="float32")
    (folders[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no tensors in"):
        weights.load(folders[0], dtype="float32")
    for name in (str(tmp_path / "nowhere"), tmp_path / "nowhere", "no/name/of/the/hub"):
        with pytest.raises(ValueError, match=f"{name}: no such checkpoint folder$"):
            weights.load(name)


def test_hub_names_are_snapshots_of_a_revision(folders, tmp_path, monkeypatch):
    # Offline, with a cache laid out as huggingface_hub does it; what it lacks, and what no hub has, is one error.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--tiny"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folders[0], repository / "snapshots" / commit)
    edit_json(repository / "snapshots" / ("b" * 40), rms_norm_eps=0.5)
    assert weights.load("someone/tiny", folders[1], "float32").config.norm_eps == 1e-6
    assert weights.load("someone/tiny", folders[1], "float32", revision="v2").config.norm_eps == 0.5
    gates = tmp_path / "hub" / "models--someone--gates"
    (gates / "refs").mkdir(parents=True)
    (gates / "refs" / "main").write_text("c" * 40)
    shutil.copytree(folders[1], gates / "snapshots" / ("c" * 40))
    assert_same(
        weights.load(folders[0], "someone/gates", "float32"), weights.load(folders[0], folders[1], "float32"), GateParam
    )
    for name, revision in (("someone/tiny", "v3"), ("someone/else", None), ("gpt2", None), ("--/..", None)):
        with pytest.raises(ValueError, match=f"^{name}: no such checkpoint folder, and not to be had from the hub: "):
            weights.load(name, revision=revision)


def test_unknown_dtype_and_config_that_is_no_object(folders):
    with pytest.raises(ValueError, match="dtype must be .*float16"):
        weights.load(folders[0], dtype="float16")
    (folders[0] / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        weights.load(folders[0])


def test_a_backbone_no_family_describes_is_not_saved(tmp_path):
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        (dict(output_bias=True), "output_bias=True; the nearest is llama"),
        (dict(qk_norm=True, mlp_bias=True), "mlp_bias=True; the nearest is qwen3"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5; the nearest is llama"),
        (dict(sliding_window=3, sliding_layers=(1,)), r"sliding_layers=\(1,\); the nearest is mistral"),
    )
    for changes, named in refused:
        with pytest.raises(ValueError, match=f"no Hugging Face family has {named}"):
            weights.save_backbone(tiny_model(**changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    (
        (dict(model_type="gpt2"), "model_type 'gpt2'"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(hidden_size=...), "hidden_size is missing"),
        (dict(hidden_size="64"), "hidden_size must be a whole number above 0, got '64'"),
        (dict(quantization_config={"bits": 4}), "quantization_config {'bits': 4}"),
        (dict(model_type="mistral", attention_bias=True), "attention_bias True (mistral has none)"),
        (dict(model_type="qwen3", mlp_bias=True), "mlp_bias True (qwen3 has none)"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 (llama has none)"),
        (dict(rope_scaling=[1]), "rope_scaling must be an object, got [1]"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling 'dynamic' (known: default, linear"),
        (dict(rope_parameters=dict(rope_type="yarn")), "rope_parameters.factor is missing"),
        (dict(rope_scaling=dict(rope_type="linear", factor="2")), "rope_scaling.factor must be a positive number"),
        (dict(rope_scaling=dict(type="default", mrope_section=[1])), "rope_scaling.mrope_section is not known"),
        (dict(rope_scaling=dict(type="yarn", factor=2.0), max_position_embeddings=...), "original_max_position_emb"),
        (dict(model_type="mistral", sliding_window="4"), "sliding_window must be null or a whole number above 0"),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers="1"),
            "max_window_layers must",
        ),
        (dict(layer_types=["sliding_attention", "full_attention"]), "but there is no sliding_window in use"),
        (dict(model_type="mistral", sliding_window=4, layer_types=["full_attention"] * 2), "mistral has sliding_att"),
        (dict(model_type="qwen3", layer_types=["chunked", "full_attention"]), "layer_types ['chunked'] (known: full"),
        (dict(model_type="qwen3", layer_types=["full_attention"]), "layer_types must name 2 layers"),
    ),
)
def test_unsupported_features_are_named(folders, changes, message):
    # One by one, and together with another problem.
    for more, also in (({}, ""), (dict(vocab_size=...), "vocab_size is missing")):
        edit_json(folders[0], **changes, **more)
        with pytest.raises(ValueError) as error:
            weights.load(folders[0])
        assert message in str(error.value) and also in str(error.value)


@pytest.mark.parametrize(
    "changes, want",
    (
        (dict(head_dim=..., num_key_value_heads=...), dict(head_size=4, num_kv_heads=4)),
        (dict(rope_theta=..., rope_parameters=dict(rope_theta=5e5)), dict(rope_theta=5e5)),
        (dict(rope_theta=...), dict(rope_theta=1e4)),
        (dict(model_type="qwen2", attention_bias=...), dict(qkv_bias=True)),
        (dict(model_type="mistral", sliding_window=None), {}),
        (dict(model_type="mistral"), dict(sliding_window=4096, sliding_layers=(0, 1))),
        (dict(sliding_window=128), {}),
        (dict(model_type="qwen2", sliding_window=128, use_sliding_window=False), dict(qkv_bias=True)),
        (
            dict(model_type="qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=1),
            dict(qkv_bias=True, sliding_window=128, sliding_layers=(1,)),
        ),
        (dict(model_type="qwen2", sliding_window=128, use_sliding_window=True), dict(qkv_bias=True)),
        (
            dict(rope_scaling=dict(type="yarn", factor=4.0, mscale=2.0, mscale_all_dim=1.0), max_position_embeddings=8),
            dict(
                rope_scaling=RopeScaling(
                    "yarn",
                    factor=4.0,
                    original_length=8,
                    attention_factor=(0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
                ),
                context=32,
            ),
        ),
        (
            dict(
                model_type="phi3",
                rope_scaling=dict(type="su", short_factor=[1, 2], long_factor=[3, 4]),
                partial_rotary_factor=0.5,
                original_max_position_embeddings=16,
                max_position_embeddings=64,
            ),
            dict(
                partial_rotary_factor=0.5,
                rope_scaling=RopeScaling(
                    "longrope",
                    original_length=16,
                    attention_factor=math.sqrt(1 + math.log(4) / math.log(16)),
                    short_factor=(1.0, 2.0),
                    long_factor=(3.0, 4.0),
                ),
                context=64,
            ),
        ),
        (dict(tie_word_embeddings=True), dict(tie_embeddings=True)),
    ),
)
def test_configs_of_other_writers(folders, changes, want):
    edit_json(folders[0], **changes)
    assert huggingface.read_model_config(folders[0], "float32") == tiny_config(**want)


@pytest.mark.parametrize("existing", (False, True))
def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch, existing):
    model, other = tiny_model(GATES[0]), tiny_model(GATES[0], seed=1)
    if existing:
        weights.save_backbone(model, tmp_path)
        gate_files.save_gates(model, tmp_path / "gates")
    read = lambda: {p.relative_to(tmp_path): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    before = read()

    def disk_full(tensors, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("retention_jax.models.tensors.save_file", disk_full)
    for save, folder in ((weights.save_backbone, tmp_path), (gate_files.save_gates, tmp_path / "gates")):
        with pytest.raises(OSError, match="No space left"):
            save(other, folder)
    assert read() == before and bool(before) == existing

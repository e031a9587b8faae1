"""Tiny random checkpoints written by `transformers`: the same logits, whole and token by token, on 1 device and 8.

Sequences are longer than the contexts that RoPE is stretched from, and than sliding windows.
"""

import numpy as np
import pytest

import retention_jax as rj
from retention_jax.parallel import sharding

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.one_version,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about its own arguments' names
]

T = 24
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    original_max_position_embeddings=16,
    short_factor=[1.0, 1.1, 1.5, 2.0],
    long_factor=[2.0, 3.0, 4.0, 9.0],
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
PHI3 = dict(original_max_position_embeddings=16)
CASES = {
    "llama3": ("llama", dict(rope_parameters=LLAMA3 | dict(rope_theta=1e4, original_max_position_embeddings=16))),
    "linear": (
        "llama",
        dict(attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="linear", rope_theta=1e3, factor=3.0)),
    ),
    "mistral": ("mistral", dict(sliding_window=7, num_hidden_layers=1)),
    "qwen2": (
        "qwen2",
        dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "yarn": ("qwen3", dict(head_dim=16, num_hidden_layers=1, rope_parameters=YARN | dict(rope_theta=1e6))),
    "longrope": ("phi3", dict(sliding_window=9, rope_parameters=LONGROPE) | PHI3),
    "partial": ("phi3", dict(hidden_size=64, rope_parameters=LONGROPE | dict(partial_rotary_factor=0.5)) | PHI3),
}


def original(case: str):
    """A model of `transformers` with weights large enough that everything in it matters."""
    model_type, changes = CASES[case]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **(SIZES | changes)), attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.25 * noise)
    return model


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, SIZES["vocab_size"], (rows, T)).astype(np.int32)


@torch.no_grad()
def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    return model(torch.tensor(tokens.astype(np.int64))).logits.numpy()


@torch.no_grad()
def stepwise_logits_of(model, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V], one token at a time on the model's own cache."""
    steps, past = [], None
    for column in torch.tensor(tokens.astype(np.int64)).T:
        out = model(column[:, None], past_key_values=past, use_cache=True)
        steps, past = [*steps, out.logits[:, 0].numpy()], out.past_key_values
    return np.stack(steps, axis=1)


def assert_logits(got, want) -> None:
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    theirs, tokens = original(case), tokens_of(2)
    theirs.save_pretrained(tmp_path)
    ours = rj.load(tmp_path, dtype="float32")
    want = logits_of(theirs, tokens)
    assert_logits(ours(tokens)[0], want)
    if case != "partial":  # which only Phi-3 has, and we write tensors apart
        rj.save_backbone(ours, tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert_logits(logits_of(again.eval(), tokens), want)


@pytest.mark.parametrize("case", ("mistral", "qwen2", "yarn", "longrope"))
def test_logits_token_by_token(case, tmp_path):
    theirs, tokens = original(case), tokens_of(2)
    theirs.save_pretrained(tmp_path)
    ours = rj.load(tmp_path, dtype="float32")
    # Everything fits the budget, so the cache is a full one.
    logits, buffer = rj.prefill(ours, tokens[:, :1], rj.CacheConfig(budget=T, recent=5))
    steps = [logits]
    for column in tokens.T[1:]:
        logits, buffer = rj.decode(ours, column, buffer)
        steps.append(logits)
    assert_logits(np.stack(steps, axis=1), stepwise_logits_of(theirs, tokens))


@pytest.mark.parametrize("case", ("llama3", "qwen2"))
def test_logits_on_eight_devices(case, tmp_path):
    theirs, tokens = original(case), tokens_of(2)
    theirs.save_pretrained(tmp_path)
    ours = rj.load(tmp_path, dtype="float32", mesh=sharding.make_mesh(fsdp=2, tensor=4))
    assert_logits(ours(tokens)[0], logits_of(theirs, tokens))


@pytest.mark.parametrize("dtype, shards", (("bfloat16", "1GB"), ("float16", "10KB")))
def test_files_of_every_kind(dtype, shards, tmp_path):
    original("mistral").to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "1GB")
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens_of(2)
    assert_logits(rj.load(tmp_path, dtype="float32")(tokens)[0], logits_of(theirs.eval(), tokens))


def test_longrope_chooses_for_each_row_and_for_the_whole_prompt(tmp_path):
    # 9 tokens take the short factors, 24 the long ones from their first token on, side by side and in chunks.
    theirs, tokens, lengths = original("longrope"), tokens_of(2), (9, T)
    theirs.save_pretrained(tmp_path)
    ours = rj.load(tmp_path, dtype="float32")
    cache = rj.CacheConfig(budget=T, recent=5, prefill_chunk=8)
    logits, _ = rj.prefill(ours, tokens, cache, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_logits(logits[row], logits_of(theirs, tokens[row : row + 1, :length])[0, -1])

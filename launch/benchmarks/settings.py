"""What is measured: model shapes by name, sizes, and the least work that each task takes whatever program does it."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import model_shapes
from flax import nnx

import retention_jax as rj
from retention_jax.models.decoder import Decoder

# "small" is for a CPU.
_SMALL = dict(vocab_size=1024, num_layers=4, width=256, num_heads=8, num_kv_heads=4, head_size=32, qk_norm=True)
SHAPES: dict[str, dict[str, Any]] = {
    "small": _SMALL | dict(mlp_width=768, tie_embeddings=True),
    **model_shapes.SHAPES,
}


def model_config(name: str, dtype: Literal["float32", "bfloat16"], **changes: int | None) -> rj.ModelConfig:
    """A shape by name, or of a checkpoint's folder, with some of its numbers changed, where they are not None."""
    given = {field: value for field, value in changes.items() if value is not None}
    if name not in SHAPES:
        return dataclasses.replace(model_shapes.of(name, dtype), **given)
    return rj.ModelConfig(**{**SHAPES[name], **given, "dtype": dtype})


def random_gate(width: int) -> rj.GateConfig:
    """Gates that differ from token to token, as trained ones do: an offset of 4 and wide weights."""
    return rj.GateConfig(width=width, offset_init=4.0, init_std=0.2)


class Settings(NamedTuple):
    """One run of the benchmark."""

    model: rj.ModelConfig
    gate: rj.GateConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # tokens
    budgets: tuple[int, ...]  # M
    recent: int  # R
    chunk: int  # tokens of a prompt read at a time
    new_tokens: int  # decoded in each timing
    repeats: int  # timings, of which the median counts
    labels: float  # share of a row's tokens that a training step is to predict
    remat: bool  # whether a training step recomputes its layers
    checkpoint: str  # folder of weights for `transformers`; "" makes random ones

    def with_layers(self, layers: int) -> "Settings":
        return self._replace(model=dataclasses.replace(self.model, num_layers=layers))

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Batch and context of every block of rows."""
        return [(batch, context) for batch in self.batches for context in self.contexts]

    @property
    def heads(self) -> int:
        """Layers times key/value heads."""
        return self.model.num_layers * self.model.num_kv_heads

    @property
    def entry_bytes(self) -> int:
        """A key and a value."""
        return 2 * self.model.head_size * jax.numpy.dtype(self.model.dtype).itemsize


def new_model(settings: Settings) -> Decoder:
    """Random weights; to be called under `jax.jit`, so that they are made on the device."""
    return Decoder(settings.model, settings.gate, rngs=nnx.Rngs(0))


class Weights(NamedTuple):
    """How much of a model each token has to do with."""

    layers: int  # parameters that every token is multiplied by
    head: int  # of the vocabulary head
    bytes: int  # all that one decoding step reads: layers, gates and head, but not the table of embeddings


def weights(settings: Settings) -> Weights:
    shapes = jax.eval_shape(lambda: new_model(settings))
    size = lambda part: sum(a.size for a in jax.tree.leaves(part))
    nbytes = lambda part: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(part))
    head = shapes.embedding if shapes.lm_head is None else shapes.lm_head
    return Weights(size(shapes.layers), size(head), nbytes((shapes.layers, head, shapes.final_projection)))


class Work(NamedTuple):
    """The least that a task takes: no program can do with less."""

    flops: float
    bytes: float  # to and from the device's memory


def attention_flops(model: rj.ModelConfig, pairs: float) -> float:
    """Forward attention of all layers over `pairs` of query and key: two products of 2 H for each query head."""
    return 4.0 * model.num_heads * model.head_size * model.num_layers * pairs


def decoding_work(settings: Settings, batch: int, live: float) -> Work:
    """One token for each of `batch` rows: weights once, and the `live` entries that a head holds on average."""
    model, parts = settings.model, weights(settings)
    return Work(
        batch * (2.0 * (parts.layers + parts.head) + attention_flops(model, live)),
        parts.bytes + batch * settings.heads * live * settings.entry_bytes,
    )


def reading_work(settings: Settings, batch: int, tokens: int, start: int, kept: int) -> Work:
    """A prompt's tokens `start` to `start + tokens` with at most `kept` entries a head before each chunk."""
    chunk, pairs = min(settings.chunk, tokens), 0.0
    for begin in range(start, start + tokens, chunk):
        size = min(chunk, start + tokens - begin)
        pairs += size * (min(begin, kept) + (size + 1) / 2)
    parts = weights(settings)
    held = batch * settings.heads * min(start + tokens, kept) * settings.entry_bytes
    flops = batch * (2.0 * parts.layers * tokens + attention_flops(settings.model, pairs))
    return Work(flops, -(-tokens // chunk) * (parts.bytes + held))


def training_work(settings: Settings, batch: int, tokens: int) -> Work:
    """A gate step: teacher and student forward, the gradient of the activations, and with `remat` the student again.

    Attention's backward pass is 2.5 times its forward pass. The vocabulary head is needed at labels only, and its
    logits are always made again. Bytes are not what bounds it.
    """
    parts, again = weights(settings), float(settings.remat)
    attention = (4.5 + again) * attention_flops(settings.model, tokens * (tokens + 1) / 2)
    products = (6.0 + 2.0 * again) * parts.layers + settings.labels * 10.0 * parts.head
    return Work(batch * (products * tokens + attention), 0.0)

"""Models from checkpoint folders and back, in safetensors and JSON.

    backbone folder   config.json, model*.safetensors         as Hugging Face writes them (`huggingface.py`)
    gate folder       config.json, gates.safetensors or .pth  as the gates were released (`gate_files.py`)

Two tables there say where each named tensor goes; loading and saving both read them.
"""

import dataclasses
import os
import pathlib

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retention_jax.config import GateConfig
from retention_jax.models import gate_files, huggingface, huggingface_vision, tensors
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam
from retention_jax.models.gate_files import Gates
from retention_jax.parallel import sharding
from retention_jax.runtime import hub


def load(
    folder: str | os.PathLike,
    gates: str | os.PathLike | None = None,
    dtype: str = "bfloat16",
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """A decoder from a Hugging Face checkpoint, with gates from a gate folder.

    Args:
      folder: a local folder, a name on the Hugging Face hub (only JSON, templates and safetensors are downloaded), or
        `builtin:recall`.
      gates: a gate folder, released or ours, its name on the hub, or `builtin:recall_gates`; without one the model gets
        fresh gates that forget next to nothing.
      dtype: of the backbone; gates are float32.
      revision: branch, tag or commit on the hub.
      mesh: lays weights and gates out as `sharding.DECODING` says; None: all on the default device.

    Raises:
      ValueError: when a folder or file is missing, damaged or unsupported, or tensors are missing, extra or of another
        shape (all listed).
    """
    found = read_gates(gates) if gates is not None else None
    kind = found.config if found else GateConfig()
    return load_backbone(folder, kind, dtype, gates=found, revision=revision, mesh=mesh, table=sharding.DECODING)


def read_gates(folder: str | os.PathLike) -> Gates:
    """The gates of a folder, a hub name or `builtin:NAME`; raises what `hub.resolve` and `gate_files.read_gates` do."""
    return gate_files.read_gates(hub.resolve(folder, files=("config.json", gate_files.OURS, gate_files.OFFICIAL)))


def load_backbone(
    folder: str | os.PathLike,
    gate: GateConfig,
    dtype: str,
    *,
    seed: int = 0,
    gates: Gates | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    table: dict[str, P] = sharding.WEIGHTS,
) -> Decoder:
    """A decoder from a Hugging Face checkpoint with freshly initialised gates; takes and raises what `load` does.

    Args:
      folder: as for `load`.
      gate: what gates are like.
      dtype: of the backbone.
      seed: of the fresh gates.
      gates: in place of fresh ones; `gate` is what they are like.
      revision: as for `load`.
      mesh: as for `load`.
      table: how a mesh's devices share the weights.
    """
    folder = hub.resolve(folder, revision)
    model = _without_values(folder, gate, dtype)
    if gates is not None:
        gate_files.load_gates(model, gates)  # first: what does not fit shows before gigabytes are read
    _read_backbone(model, folder, mesh, table)
    if gates is None:
        init_gates(model, seed=seed, mesh=mesh)
    elif mesh is not None:
        read = nnx.state(model, GateParam)
        nnx.update(model, jax.device_put(read, sharding.of_tree(sharding.automatic(mesh), read)))
    return model


def _without_values(folder: pathlib.Path, gate: GateConfig, dtype: str) -> Decoder:
    """A decoder of a checkpoint's architecture whose variables are shapes without values yet.

    A head that is stored beside an embedding it should be tied to, and differs from it, is kept: `transformers` does so
    too. Equal ones, which some exporters write, are one.
    """
    cfg = huggingface.read_model_config(folder, dtype)
    if cfg.tie_embeddings:
        found = tensors.read_headers(tensors.checkpoint_files(folder))
        name = f"{huggingface_vision.prefixes(found).text}embed_tokens.weight"
        embedding, head = found.get(name), found.get("lm_head.weight")
        if embedding is not None and head is not None and not tensors.equal(embedding, head):
            logging.warning(
                "%s: config.json has tie_word_embeddings=true, but lm_head.weight differs from "
                "%s: both are used, as if it were false",
                folder,
                name,
            )
            cfg = dataclasses.replace(cfg, tie_embeddings=False)
    return nnx.eval_shape(lambda: Decoder(cfg, gate, rngs=nnx.Rngs(0)))


def _read_backbone(model: Decoder, folder: pathlib.Path, mesh: Mesh | None, table: dict[str, P]) -> None:
    """Puts a checkpoint's weights into a decoder, in place."""
    mesh, cfg = mesh and sharding.automatic(mesh), model.config
    if mesh is not None:
        sharding.warn_of_uncut(mesh, model, table)
    found = tensors.read_headers(tensors.checkpoint_files(folder))
    if cfg.tie_embeddings:
        found.pop("lm_head.weight", None)  # some exporters write the tied head out as well
    # Llama 2's were saved with a buffer that RoPE's formula gives too.
    found = {name: header for name, header in found.items() if not name.endswith(".inv_freq")}
    prefixes = huggingface_vision.prefixes(found)
    fused = f"{prefixes.text}layers.0.self_attn.qkv_proj.weight" in found
    places = huggingface.backbone_places(cfg, fused=fused, prefixes=prefixes)
    layout = lambda path, shape: mesh and sharding.of_weight(mesh, path[-1], shape, table)
    tensors.stream(model, nnx.Param, places, found, layout, where=folder)


def init_gates(model: Decoder, *, seed: int, mesh: Mesh | None = None) -> None:
    """Puts freshly initialised gates into a decoder, in place."""

    def fresh() -> nnx.State:
        return nnx.state(Decoder(model.config, model.gate_config, rngs=nnx.Rngs(seed)), GateParam)

    layout = mesh and sharding.of_tree(sharding.automatic(mesh), jax.eval_shape(fresh))
    nnx.update(model, jax.jit(fresh, out_shardings=layout)())


def save_backbone(model: Decoder, folder: str | os.PathLike) -> None:
    """Writes the backbone as a Hugging Face folder; raises ValueError if no family there has its architecture."""
    places, config = huggingface.backbone_places(model.config), huggingface.model_config_json(model.config)
    tensors.save(model, nnx.Param, places, folder, "model.safetensors", config)

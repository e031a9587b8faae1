"""What compiled decoding sends between devices; as a script, for TPUs that are not there: a JSON list.

    python tests/decode_on_mesh.py v6e:2x4

Needs the libtpu wheel and no TPU.
"""

import json
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax is imported: no TPU is looked for, and several compilers may run at once
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("RETENTION_JAX_KERNELS", "tpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from retention_jax import cache
from retention_jax.config import CacheConfig, GateConfig, ModelConfig
from retention_jax.generation import decoding
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "launch"))
import hlo  # noqa: E402  # pyright: ignore[reportMissingImports]  # found by the line above

COLLECTIVE = re.compile(
    r"\s+(?:ROOT )?%\S+ = (?P<type>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all)"
    r"(?:-start)?\("
)
ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\]")

# No two of these arrays have one size, so that a size tells what is sent.
MODEL: dict[str, Any] = dict(
    vocab_size=64, num_layers=2, num_heads=12, num_kv_heads=4, head_size=6, width=40, mlp_width=56
)


class Sent(NamedTuple):
    """One array of a collective, as each device gets it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    evicting: bool

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return int(np.prod(self.shape)) * (int(bits[0]) // 8 if bits else 1)


def sent(lowered: jax.stages.Lowered) -> list[Sent]:
    """Every array of every collective of a program, once for each place in the program."""
    _, text = hlo.compiled(lowered)
    return [
        Sent(found["kind"], array["dtype"], tuple(int(n) for n in array["sizes"].split(",") if n), "/evict/" in line)
        for line in text.splitlines()
        if (found := COLLECTIVE.match(line))
        for array in ARRAY.finditer(found["type"])
    ]


def lower_decode(model: Decoder, cfg: CacheConfig, batch: int, mesh: Mesh) -> jax.stages.Lowered:
    """`decode` of shapes that are laid out on a mesh: one token, and the loop that evicts."""
    with jax.set_mesh(mesh):
        buffer = cache.shapes(model.config, cfg, batch)
        tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return jax.jit(decoding.decode, donate_argnames="buffer").lower(model, tokens, buffer=buffer)


def main(topology: str) -> None:
    from jax.experimental import topologies

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(2, 1, 1, -1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    cfg = ModelConfig(**{**MODEL, "head_size": 128, "dtype": "bfloat16", "sliding_window": 64, "sliding_layers": (1,)})
    model = nnx.eval_shape(lambda: Decoder(cfg, GateConfig(width=16), rngs=nnx.Rngs(0)))
    layout = sharding.of_tree(mesh, model, sharding.DECODING)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), model, layout)
    print(json.dumps(sent(lower_decode(placed, CacheConfig(budget=256, recent=16), 4, mesh))))


if __name__ == "__main__":
    main(sys.argv[1])

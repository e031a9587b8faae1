"""The retention gate: from the hidden state that enters attention to `log_beta`, how fast a cached entry is forgotten.

    u1 = silu(W1 x + b1)            per layer, [W]
    u2 = silu(W2 u1 + b2)           per layer, [W] or, with share "layers_and_heads", [K, W]
    log_beta = log_sigmoid(W3 u2 + c)

TRIM-KV (arXiv 2512.03324; kind `rg` of the released gates) has one hidden layer, where W3 reads u1, and shares nothing;
DBTrimKV (arXiv 2605.09649; `rg10`) has both. A final projection (W3, c) that is shared makes scores comparable over
layers and heads, so that one budget serves all of them. What exactly is shared differs between paper and release:

    share               W3          c
    layers              [1, K, W]   [1, K], or [L, K] untied    released DBTrimKV gates
    layers_and_heads    [1, 1, W]   [1, 1]                      the paper's words
    none                [L, K, W]   [L, K]                      TRIM-KV

Everything is float32 whatever the backbone's dtype: near an offset of 18 one bfloat16 step changes log_beta by 12 %.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from retention_jax.config import GateConfig, ModelConfig


class GateParam(nnx.Variable):
    """A parameter of a gate: what the gate stage trains, and all that its checkpoints hold."""


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> GateParam:
    return GateParam(std * jax.random.normal(rngs.gate(), shape, jnp.float32))


class GateFeatures(nnx.Module):
    """The part of the gate that each layer has for itself."""

    def __init__(self, model: ModelConfig, gate: GateConfig, *, rngs: nnx.Rngs):
        self.w1 = _normal(rngs, (model.width, gate.width), gate.init_std)
        self.b1 = GateParam(jnp.zeros(gate.width, jnp.float32))
        heads = model.num_kv_heads if gate.share == "layers_and_heads" else 1
        two = gate.hidden_layers == 2
        self.w2 = _normal(rngs, (gate.width, heads, gate.width), gate.init_std) if two else None
        self.b2 = GateParam(jnp.zeros((heads, gate.width), jnp.float32)) if two else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T heads W"]:
        """Features of each token; `heads` is 1 where all heads read the same ones."""
        dot = lambda spec, a, b: jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
        u1 = jax.nn.silu(dot("btd,dw->btw", x.astype(jnp.float32), self.w1[...]) + self.b1[...][None, None])
        if self.w2 is None or self.b2 is None:
            return u1[:, :, None]
        return jax.nn.silu(dot("btw,whu->bthu", u1, self.w2[...]) + self.b2[...][None, None])


class FinalProjection(nnx.Module):
    """W3 and c, stored once for whatever shares them (axes of size 1 are shared)."""

    def __init__(self, model: ModelConfig, gate: GateConfig, *, rngs: nnx.Rngs):
        layers = model.num_layers if gate.share == "none" else 1
        heads = 1 if gate.share == "layers_and_heads" else model.num_kv_heads
        offset_layers = layers if gate.tie_offset else model.num_layers
        self.weight = _normal(rngs, (layers, heads, gate.width), gate.init_std)
        self.offset = GateParam(jnp.full((offset_layers, heads), gate.offset_init, jnp.float32))

    def per_layer(self, layers: int, heads: int) -> tuple[Float[Array, "L K W"], Float[Array, "L K"]]:
        """W3 and c spread out over layers and heads, ready to be scanned."""
        weight = jnp.broadcast_to(self.weight[...], (layers, heads, self.weight[...].shape[-1]))
        return weight, jnp.broadcast_to(self.offset[...], (layers, heads))


def log_retention(
    features: Float[Array, "B T heads W"], weight: Float[Array, "K W"], offset: Float[Array, " K"]
) -> Float[Array, "B K T"]:
    """log_beta <= 0 of each token and key/value head of one layer, float32."""
    dot = lambda spec, a: jnp.einsum(spec, a, weight, precision=jax.lax.Precision.HIGHEST)
    # Where all heads read the same features, one matrix product is much faster than a dot product for each head.
    logit = dot("btw,kw->bkt", features[:, :, 0]) if features.shape[2] == 1 else dot("btkw,kw->bkt", features)
    return jax.nn.log_sigmoid(logit + offset[None, :, None])

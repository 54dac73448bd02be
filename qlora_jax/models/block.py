"""One layer of a decoder, or all of them stacked."""

from collections.abc import Mapping

from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.models.attention import Attention, Context
from qlora_jax.models.cache import KVCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import linear_shapes, norm_sizes
from qlora_jax.models.linear import Branches, Linear
from qlora_jax.models.mlp import GatedMLP
from qlora_jax.models.norms import RMSNorm
from qlora_jax.quantization.tensor import QuantizedTensor

Weights = Mapping[str, Array | QuantizedTensor]


class Block(nnx.Module):
    """One layer, or all of them stacked: attention and feed-forward, each behind a norm.

    A family with post_norms has a norm behind each of both too, before it is added to x.
    """

    def __init__(self, config: ModelConfig, weights: Weights):
        offset = config.family.norm_offset
        linears = {
            name: Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))
            for name in linear_shapes(config)
        }
        norms = {
            name: RMSNorm(weights[f"{name}.weight"], config.rms_norm_eps, offset)
            for name in norm_sizes(config)
        }
        attention, mlp = "self_attn.", "mlp."
        self.self_attn = Attention(config, part(linears, attention), part(norms, attention))
        self.mlp = GatedMLP(part(linears, mlp), config.family.activation)
        self.post_norms = config.family.post_norms
        for name, norm in norms.items():
            if "." not in name:
                setattr(self, name, norm)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        branches: Branches,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        mixed, cache = self.self_attn(self.input_layernorm(x), context, branches, cache, layer)
        if not self.post_norms:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x), branches), cache
        x = x + self.post_attention_layernorm(mixed)
        inner = self.mlp(self.pre_feedforward_layernorm(x), branches)
        return x + self.post_feedforward_layernorm(inner), cache


def part(modules: Mapping[str, nnx.Module], prefix: str) -> dict[str, nnx.Module]:
    """The modules whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): m for k, m in modules.items() if k.startswith(prefix)}

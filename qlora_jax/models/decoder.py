"""The decoder: embedding, a scan over stacked layers, a head. One program whatever the depth."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.errors import InputError, listed
from qlora_jax.models.attention import Attention, Context
from qlora_jax.models.cache import KVCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import linear_shapes, module_shapes, norm_sizes, weight_shapes
from qlora_jax.models.linear import Branch, Branches, Linear, matmul
from qlora_jax.models.mlp import GatedMLP
from qlora_jax.models.norms import RMSNorm
from qlora_jax.models.rope import rotation
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import EMBEDDINGS, HEAD, LAYERS, NORM

Ids = Int[Array | np.ndarray, "B S"]
Rotation = tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
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


class Decoder(nnx.Module):
    """A frozen causal language model, dense or 4-bit: token ids to logits.

    Attributes:
      config: its shape, static.
      dtype: of the activations and the dense weights; norms, softmax, rotary positions and the
        logits are float32 whatever it is.
    """

    def __init__(self, config: ModelConfig, weights: Weights, dtype: str = "bfloat16"):
        self.config = config
        self.dtype = dtype
        self.embed_tokens = nnx.Variable(weights[EMBEDDINGS])
        layers = {k.removeprefix(LAYERS): w for k, w in weights.items() if k.startswith(LAYERS)}
        self.layers = Block(config, layers)
        norm = weights[NORM]
        self.norm = RMSNorm(norm, config.rms_norm_eps, config.family.norm_offset)
        head = weights.get(HEAD)
        self.lm_head = None if config.tie_word_embeddings else nnx.Variable(head)

    @staticmethod
    def from_weights(config: ModelConfig, weights: Weights, dtype: str = "bfloat16") -> "Decoder":
        """A decoder around `weights`, by stacked name; those of layers have a leading axis L.

        Raises:
          InputError: a weight is missing, unknown, or not of the shape that `config` gives it.
        """
        expected = weight_shapes(config)
        if missing := expected.keys() - weights.keys():
            raise InputError("MODEL-MISSING", "weights", f"missing: {listed(sorted(missing))}")
        if unknown := weights.keys() - expected.keys():
            raise InputError("MODEL-UNKNOWN", "weights", f"unknown: {listed(sorted(unknown))}")
        for name, weight in weights.items():
            lead = (config.num_hidden_layers,) if name.startswith(LAYERS) else ()
            shape = lead + expected[name]
            if isinstance(weight, QuantizedTensor):
                found = (*weight.lead, *weight.shape)
            else:
                found = weight.shape
            if tuple(found) != shape:
                raise InputError("MODEL-SHAPE", name, f"shape {tuple(found)}", f"shape {shape}")
        return Decoder(config, weights, dtype)

    def weights(self) -> dict[str, Array | QuantizedTensor]:
        """Every weight by its stacked name, as `from_weights` takes them; no copies."""
        found: dict[str, Array | QuantizedTensor] = {}
        for name in weight_shapes(self.config):
            node = self
            for part in name.removeprefix("model.").removesuffix(".weight").split("."):
                node = getattr(node, part)
            if isinstance(node, nnx.Variable):  # embedding, head, a bias
                found[name] = node.get_value()
            else:
                found[name] = node.weight.get_value()
        return found

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of what an adapter is for: linears of a layer, and what it can hold in full."""
        return module_shapes(self.config)

    def head(self, adapter: Adapter | None = None) -> Array | QuantizedTensor:
        """The weight (V, D) that turns hidden states into logits; the embedding when tied.

        An adapter that holds a trained head has it before the model's.
        """
        if adapter is not None and (saved := adapter.params.get("lm_head")):
            return saved["weight"]
        return (self.embed_tokens if self.lm_head is None else self.lm_head).get_value()

    def embedded(self, input_ids: Ids, adapter: Adapter | None) -> Float[Array, "B S D"]:
        """The tokens' embeddings, an adapter's before the model's, as the layers want them."""
        table = self.embed_tokens.get_value()
        if adapter is not None and (saved := adapter.params.get("embed_tokens")):
            table = saved["weight"]
        x = jnp.take(table, input_ids, axis=0).astype(self.dtype)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def __call__(
        self,
        input_ids: Ids,
        *,
        attention_mask: Ids | None = None,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
        adapter: Adapter | None = None,
        cache: KVCache | None = None,
        dropout_key: Array | None = None,
    ):
        """Logits (B, S, V) float32; with a cache, (logits, the cache with these tokens in it).

        Args:
          input_ids: (B, S) int32.
          attention_mask: (B, S), 1 for tokens and 0 for padding, as transformers has it; the
            same as `segment_ids` for one sequence a row.
          positions: (B, S) int32, rotary positions; by default each row counts its own tokens.
          segment_ids: (B, S) int32; tokens see only earlier tokens of their own segment, and 0 is
            padding. With a cache it only tells padding, which must stand on the right.
          adapter: an Adapter whose targets are this model's linears.
          cache: keys and values of the tokens before.
          dropout_key: a key, in training only, for the adapter's dropout.
        """
        x, cache = self.run(
            input_ids,
            positions,
            attention_mask if segment_ids is None else segment_ids,
            adapter,
            cache,
            dropout_key,
        )
        trained = adapter is not None and "lm_head" in adapter.params
        logits = matmul(x, self.head(adapter), frozen=not trained).astype(jnp.float32)
        if cap := self.config.logit_softcap:
            logits = jnp.tanh(logits / cap) * cap
        return logits if cache is None else (logits, cache)

    def hidden(
        self,
        input_ids: Ids,
        *,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
        adapter: Adapter | None = None,
        dropout_key: Array | None = None,
        remat: str = "none",
    ) -> Float[Array, "B S D"]:
        """The states behind the final norm: logits are `hidden @ head().T`.

        Args:
          remat: `full` keeps each layer's input alone and computes the layer again in the
            backward pass; `none` keeps what the layers' own gradients ask for.
        """
        return self.run(input_ids, positions, segment_ids, adapter, None, dropout_key, remat)[0]

    def run(
        self,
        input_ids: Ids,
        positions: Ids | None,
        segment_ids: Ids | None,
        adapter: Adapter | None,
        cache: KVCache | None,
        dropout_key: Array | None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        input_ids, positions, segment_ids = (
            None if ids is None else jnp.asarray(ids) for ids in (input_ids, positions, segment_ids)
        )
        real = None if segment_ids is None else segment_ids > 0
        if positions is None:
            positions = default_positions(input_ids, real, cache)
        x = self.embedded(input_ids, adapter)
        config = self.config
        room = input_ids.shape[1] if cache is None else cache.k.shape[3]
        turns = rotation(config.rope, config.head_dim, positions)
        context = Context(*turns, segment_ids, config.scores(room))
        local = config.local_rope and rotation(config.local_rope, config.head_dim, positions)

        def step(carry, inputs):
            x, cache = carry
            block, layer, kind, params, scales, key = inputs
            branches = layer_branches(adapter, params, scales, key)
            return block(x, of_layer(context, kind, local), branches, cache, layer), None

        if remat == "full":
            step = jax.checkpoint(step)
        layers = config.num_hidden_layers
        params = {} if adapter is None else transposed_B(adapter)
        scales = {name: jnp.asarray(adapter.spec.scales(name)) for name in params}
        keys = None if dropout_key is None else jax.random.split(dropout_key, layers)
        inputs = (self.layers, jnp.arange(layers), kinds(config, room), params, scales, keys)
        (x, cache), _ = jax.lax.scan(step, (x, cache), inputs)
        if cache is not None:
            batch, length = input_ids.shape
            count = jnp.full((batch,), length) if real is None else real.sum(-1)
            cache = cache.advanced(count.astype(jnp.int32))
        return self.norm(x), cache


class Kinds(NamedTuple):
    """What differs between the layers of one program, by layer; None where nothing does.

    Attributes:
      local: whether a layer has the rotation of those with a window.
      window: how many tokens one sees, itself included.
    """

    local: Bool[Array | np.ndarray, "*L"] | None
    window: Int[Array | np.ndarray, "*L"] | None


def kinds(config: ModelConfig, room: int) -> Kinds:
    """What differs between the layers of a model, over texts of at most `room` tokens."""
    local = np.array([width is not None for width in config.windows])
    reach = np.array(config.reach(room), np.int32)
    differ = reach.min() < reach.max()
    return Kinds(local if config.local_rope else None, reach if differ else None)


def of_layer(context: Context, kind: Kinds, local: Rotation | None) -> Context:
    """One layer's context: its rotation and its window, where layers differ in them."""
    if kind.local is not None:
        pairs = zip(local, (context.cos, context.sin), strict=True)
        cos, sin = (jnp.where(kind.local, near, far) for near, far in pairs)
        context = context._replace(cos=cos, sin=sin)
    return context._replace(window=kind.window)


def layer_branches(adapter: Adapter | None, params, scales, key) -> Branches:
    """One layer's part of an adapter, by the name of the linear that it belongs to."""
    branches = {}
    for index, (name, pair) in enumerate(sorted(params.items())):
        own = None if key is None else jax.random.fold_in(key, index)
        dropout = adapter.spec.lora_dropout
        magnitude = pair.get("m")
        branches[name] = Branch(pair["A"], pair["Bt"], scales[name], dropout, own, magnitude)
    return branches


def transposed_B(adapter: Adapter) -> dict[str, dict[str, Array]]:
    """An adapter as the layers want it, B transposed: one pass over all layers, see lora_delta."""
    params = {}
    for name in adapter.spec.targets:
        own = dict(adapter.params[name])
        params[name] = own | {"Bt": own.pop("B").swapaxes(1, 2)}
    return params


def default_positions(
    input_ids: Int[Array, "B S"], real: Bool[Array, "B S"] | None, cache: KVCache | None
) -> Int[Array, "B S"]:
    """0, 1, 2 ... over the real tokens of each row, going on where its cache ends."""
    batch, length = input_ids.shape
    if real is None:
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    else:
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    return positions if cache is None else positions + cache.length[:, None]

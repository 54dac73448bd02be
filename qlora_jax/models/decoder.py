"""The decoder: embedding, a scan over stacked layers, a head. One program whatever the depth."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.prepared import Prepared
from qlora_jax.adapters.stack import AdapterStack, Which
from qlora_jax.errors import InputError, listed
from qlora_jax.models.block import Block
from qlora_jax.models.cache import KVCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import (
    linear_parts,
    linear_shapes,
    module_shapes,
    weight_shapes,
)
from qlora_jax.models.layers import Stack, run_layers
from qlora_jax.models.linear import head_matmul
from qlora_jax.models.norms import RMSNorm
from qlora_jax.models.one_layer import OneLayer, Others, Shared, kinds, layer_params
from qlora_jax.models.rope import rotation
from qlora_jax.placement import fetched, in_host
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import EMBEDDINGS, HEAD, LAYERS, NORM

Ids = Int[Array | np.ndarray, "B S"]
Weights = Mapping[str, Array | QuantizedTensor]
AnyAdapter = Adapter | Prepared | None


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
        self.layers = Block(config, layers) if layers else None  # None: layerwise.py has them
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
            if name.startswith(LAYERS) and self.layers is None:
                continue
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

    def head(self, adapter: AnyAdapter = None) -> Array | QuantizedTensor:
        """The weight (V, D) that turns hidden states into logits; the embedding when tied.

        An adapter that holds a trained head has it before the model's.
        """
        if adapter is not None and (saved := adapter.saved("lm_head")) is not None:
            return saved
        return (self.embed_tokens if self.lm_head is None else self.lm_head).get_value()

    def embedded(self, input_ids: Ids, adapter: AnyAdapter) -> Float[Array, "B S D"]:
        """The tokens' embeddings, an adapter's before the model's, as the layers want them."""
        table = self.embed_tokens.get_value()
        if adapter is not None and (saved := adapter.saved("embed_tokens")) is not None:
            table = saved
        x = rows_of(table, input_ids).astype(self.dtype)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def __call__(
        self,
        input_ids: Ids,
        *,
        attention_mask: Ids | None = None,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
        adapter: AnyAdapter | AdapterStack = None,
        adapter_index: Which = None,
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
          adapter: an Adapter whose targets are this model's linears, or a stack of several.
          adapter_index: with a stack, which of them each row uses, (B,) from 0, -1 for none; or
            names, or one for all rows.
          cache: keys and values of the tokens before.
          dropout_key: a key, in training only, for the adapter's dropout.
        """
        adapter = self.own_rows(adapter, adapter_index, len(input_ids))
        segment_ids = attention_mask if segment_ids is None else segment_ids
        ids = map(as_array, (input_ids, positions, segment_ids))
        return forward(self, *ids, adapter, cache, dropout_key)

    def logits(self, x: Float[Array, "*rows D"], adapter: AnyAdapter = None) -> Array:
        """Logits (*rows, V) float32 of the states behind the final norm."""
        trained = adapter is not None and adapter.saved("lm_head") is not None
        logits = head_matmul(x, fetched(self.head(adapter)), frozen=not trained)
        if cap := self.config.logit_softcap:
            logits = jnp.tanh(logits / cap) * cap
        return logits

    def hidden(
        self,
        input_ids: Ids,
        *,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
        adapter: AnyAdapter | AdapterStack = None,
        adapter_index: Which = None,
        dropout_key: Array | None = None,
        remat: str = "none",
    ) -> Float[Array, "B S D"]:
        """The states behind the final norm: logits are `hidden @ head().T`.

        Args:
          remat: what layers keep for the backward pass, one of `remat.POLICIES`.
        """
        adapter = self.own_rows(adapter, adapter_index, len(input_ids))
        return self.run(input_ids, positions, segment_ids, adapter, None, dropout_key, remat)[0]

    def own_rows(self, adapter: AnyAdapter | AdapterStack, which: Which, rows: int) -> AnyAdapter:
        """The adapter; of a stack, each row's own matrices.

        Raises:
          InputError: STACK-INDEX; STACK-BASE, a stack of another model.
        """
        if not isinstance(adapter, AdapterStack):
            if which is not None:
                found = "given, and the adapter is not a stack"
                hint = "stack_adapters({name: adapter, ...})"
                raise InputError("STACK-INDEX", "adapter_index", found, "an AdapterStack", hint)
            return adapter
        shapes = linear_shapes(self.config.as_published)
        for name, shape in adapter.shapes.items():
            if shapes.get(name) != shape or adapter.depth != self.config.num_hidden_layers:
                found = f"{name} {shape}, {adapter.depth} layers"
                own = f"{shapes.get(name)}, {self.config.num_hidden_layers} layers"
                raise InputError("STACK-BASE", "adapter", found, own, "adapters of this model")
        return adapter.rows(adapter.index(which, rows), linear_parts(self.config), self.dtype)

    def states(
        self,
        input_ids: Ids,
        *,
        segment_ids: Ids | None = None,
        adapter: AnyAdapter = None,
        cache: KVCache,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """The states behind the final norm, and the cache with these tokens in it; for decoding."""
        return self.run(input_ids, None, segment_ids, adapter, cache, None)

    def run(
        self,
        input_ids: Ids,
        positions: Ids | None,
        segment_ids: Ids | None,
        adapter: AnyAdapter,
        cache: KVCache | None,
        dropout_key: Array | None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        input_ids, positions, segment_ids = map(as_array, (input_ids, positions, segment_ids))
        real = None if segment_ids is None else segment_ids > 0
        if positions is None:
            positions = default_positions(input_ids, real, cache)
        layer, stack = self.stacked(positions, segment_ids, adapter, cache, dropout_key)
        x, cache = run_layers(layer, (self.embedded(input_ids, adapter), cache), stack, remat)
        if cache is not None:
            batch, length = input_ids.shape
            count = jnp.full((batch,), length) if real is None else real.sum(-1)
            cache = cache.advanced(count.astype(jnp.int32))
        return self.norm(x), cache

    def stacked(
        self,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None,
        adapter: AnyAdapter,
        cache: KVCache | None,
        dropout_key: Array | None,
    ) -> tuple[OneLayer, Stack]:
        """One layer as a function of (x, cache), and what all layers take beside that."""
        config = self.config
        room = positions.shape[1] if cache is None else cache.room
        far, near = (
            rope and rotation(rope, config.head_dim, positions)
            for rope in (config.rope, config.local_rope)
        )
        layers = config.num_hidden_layers
        params = layer_params(adapter, streamed=in_host(self.layers))
        if isinstance(adapter, Prepared):
            scales, dropout, segments = {}, 0.0, adapter.segments
        else:
            scales = {name: jnp.asarray(adapter.spec.scales(name)) for name in params}
            dropout = 0.0 if adapter is None else adapter.spec.lora_dropout
            segments = ()
        keys = None if dropout_key is None else jax.random.split(dropout_key, layers)
        others = Others(jnp.arange(layers), kinds(config, room), scales, keys)
        layer = OneLayer(config.scores(room), dropout, segments)
        return layer, Stack(self.layers, params, others, Shared(far, near, segment_ids))


@jax.jit  # or each call outside of one would compile its scan again
def forward(
    model: Decoder,
    input_ids: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    adapter: AnyAdapter,
    cache: KVCache | None,
    dropout_key: Array | None,
):
    """A call of the model, compiled once a shape."""
    x, cache = model.run(input_ids, positions, segment_ids, adapter, cache, dropout_key)
    logits = model.logits(x, adapter)
    return logits if cache is None else (logits, cache)


def as_array(ids: Any) -> Array | None:
    """Ids as JAX has them; None stays None."""
    return None if ids is None else jnp.asarray(ids)


def rows_of(table: Float[Array, "V D"], ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """The rows of a table, of which no more than these are copied if it lives in host memory."""
    if not in_host(table):
        return jnp.take(table, ids, axis=0)

    def row(i):
        return fetched(jax.lax.dynamic_index_in_dim(table, i, 0, False))

    return jax.lax.map(row, ids.reshape(-1)).reshape(*ids.shape, -1)


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

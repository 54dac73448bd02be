"""How an adapter begins, so that it changes nothing: A uniform, B zero, the rest the base's own."""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.adapters.adapter import Adapter, Shapes, param_shapes
from qlora_jax.adapters.dora import row_squares
from qlora_jax.adapters.spec import SAVED, LoraSpec, make_spec
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import EMBEDDINGS, LAYERS


@runtime_checkable
class Adaptable(Protocol):
    """What adapters ask of a model."""

    config: object  # with `num_hidden_layers`

    def module_shapes(self) -> Shapes:
        """(out, in) of every linear of one layer, by its name inside the layer; (V, D) of SAVED."""

    def weights(self) -> Mapping[str, Array | QuantizedTensor]:
        """Every weight by its stacked name; those of layers have a leading axis L."""


def init_lora(
    model: Adaptable,
    *,
    key: Array,
    r: int = 64,
    alpha: int | float = 16,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int | float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: Sequence[str] = (),
    dropout: int | float = 0.0,
) -> Adapter:
    """A new adapter for `model`, float32, which changes nothing before it is trained.

        lora = init_lora(model, r=64, alpha=16, targets="all-linear", key=jax.random.key(0))

    Args:
      model: what is adapted.
      key: a jax.random key.
      r, alpha, targets, exclude, rank_pattern, alpha_pattern, use_rslora, use_dora,
        modules_to_save, dropout: as for `make_spec`, which follows PEFT's LoraConfig.

    Raises:
      InputError: a value out of range, or a target that matches nothing.
    """
    spec = make_spec(
        model.module_shapes(),
        model.config.num_hidden_layers,
        r=r,
        alpha=alpha,
        targets=targets,
        exclude=exclude,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=modules_to_save,
        dropout=dropout,
    )
    return init_adapter(model, spec, key)


def init_adapter(model: Adaptable, spec: LoraSpec, key: Array) -> Adapter:
    """The beginning of an adapter: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, as PEFT begins.

    PEFT's kaiming_uniform_(a=sqrt(5)) is this distribution. A row of A depends on the key, the
    target's name, the layer and the row only: other targets, layers or ranks do not change it.
    DoRA's m are the lengths of the rows of W, and saved modules are the base's, both dequantized.

    Args:
      model: what is adapted; weights are read only for DoRA and for saved modules.
      spec: what is adapted of it.
      key: a jax.random key.
    """
    params = {}
    for name, arrays in param_shapes(spec, model.module_shapes()).items():
        if name in SAVED:
            params[name] = {"weight": saved_weight(model.weights(), name)}
            continue
        _, largest, width = arrays["A"]
        ranks = jnp.asarray(spec.ranks(name))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        params[name] = {
            "A": uniform_rows(own, ranks, largest, width),
            "B": jnp.zeros(arrays["B"], jnp.float32),
        }
        if spec.use_dora:
            weight = model.weights()[f"{LAYERS}{name}.weight"]
            norms = jnp.sqrt(squares_of_layers(weight))
            params[name]["m"] = jnp.where(ranks[:, None] > 0, norms, 0)
    return Adapter(params, spec)


def squares_of_layers(weight: Any) -> Float[Array, "L out"]:
    """`row_squares` of every layer; those that are not in memory are read one at a time."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(weight)):
        return jax.lax.map(row_squares, weight)
    layers, squares = jax.tree.leaves(weight)[0].shape[0], jax.jit(row_squares)
    return jnp.stack([squares(weight[i]) for i in range(layers)])


def saved_weight(weights: Mapping[str, Array | QuantizedTensor], name: str) -> Float[Array, "V D"]:
    """A float32 copy of the weight of lm_head or embed_tokens; a tied head is the embedding."""
    tied = weights[EMBEDDINGS]
    weight = weights.get(f"{SAVED[name]}.weight", tied)
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize("float32")
    return jnp.array(weight, jnp.float32)


@functools.partial(jax.jit, static_argnames=("largest", "width"))
def uniform_rows(key: Array, ranks: Array, largest: int, width: int) -> Float[Array, "L r in"]:
    """For each layer as many uniform rows as its rank, then zeros; each row from its own key."""
    bound = 1 / math.sqrt(width)

    def row(layer, index):
        own = jax.random.fold_in(jax.random.fold_in(key, layer), index)
        # From -1 to 1 numbers are exact, so that all is rounded once, whatever instructions do it.
        return bound * jax.random.uniform(own, (width,), jnp.float32, -1, 1)

    rows = jnp.arange(largest)
    drawn = jax.vmap(lambda layer: jax.vmap(lambda i: row(layer, i))(rows))(jnp.arange(len(ranks)))
    return jnp.where((rows < ranks[:, None])[..., None], drawn, 0)

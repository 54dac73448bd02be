"""How A and B begin: A uniform, B zero, so that a new adapter changes nothing."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import LoraSpec, make_spec


@runtime_checkable
class Adaptable(Protocol):
    """What adapters ask of a model."""

    config: object  # with `num_hidden_layers`

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of one layer, by its name inside the layer."""


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
    dropout: int | float = 0.0,
) -> Adapter:
    """A new adapter for `model`, float32, which changes nothing before it is trained.

        lora = init_lora(model, r=64, alpha=16, targets="all-linear", key=jax.random.key(0))

    Args:
      model: what is adapted; only the shapes of its linears are read.
      key: a jax.random key.
      r, alpha, targets, exclude, rank_pattern, alpha_pattern, use_rslora, dropout: as for
        `make_spec`, which follows PEFT's LoraConfig.

    Raises:
      InputError: a value out of range, or a target that matches nothing.
    """
    shapes = model.linear_shapes()
    spec = make_spec(
        shapes,
        model.config.num_hidden_layers,
        r=r,
        alpha=alpha,
        targets=targets,
        exclude=exclude,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=use_rslora,
        dropout=dropout,
    )
    return init_adapter(shapes, spec, key)


def init_adapter(shapes: Mapping[str, tuple[int, int]], spec: LoraSpec, key: Array) -> Adapter:
    """The beginning of an adapter: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, as PEFT begins.

    PEFT's kaiming_uniform_(a=sqrt(5)) is this distribution. A row of A depends on the key, the
    target's name, the layer and the row only: other targets, layers or ranks do not change it.

    Args:
      shapes: (out, in) of at least the linears that `spec` targets.
      spec: what is adapted.
      key: a jax.random key.
    """
    params = {}
    for name in spec.targets:
        out, width = shapes[name]
        ranks = jnp.asarray(spec.ranks(name))
        largest = max(spec.ranks(name))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        params[name] = {
            "A": uniform_rows(own, ranks, largest, width),
            "B": jnp.zeros((len(ranks), out, largest), jnp.float32),
        }
    return Adapter(params, spec)


def uniform_rows(key: Array, ranks: Array, largest: int, width: int) -> Float[Array, "L r in"]:
    """For each layer as many uniform rows as its rank, then zeros; each row from its own key."""
    bound = 1 / math.sqrt(width)

    def row(layer, index):
        own = jax.random.fold_in(jax.random.fold_in(key, layer), index)
        return jax.random.uniform(own, (width,), jnp.float32, -bound, bound)

    rows = jnp.arange(largest)
    drawn = jax.vmap(lambda layer: jax.vmap(lambda i: row(layer, i))(rows))(jnp.arange(len(ranks)))
    return jnp.where((rows < ranks[:, None])[..., None], drawn, 0)

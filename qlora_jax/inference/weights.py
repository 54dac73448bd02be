"""The weights that decoding reads: 4-bit ones as they are, or dense once for all tokens.

A token reads every weight once. On a GPU 4 bits are read quickest as they are stored; a CPU takes
longer to decode them than to read them in bfloat16, so for a text of some length a small model is
dequantized once, for as long as it decodes. Then q, k, v are one matrix too, and gate and up: fewer
and larger products.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import gpu
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.prepared import Prepared, prepare
from qlora_jax.adapters.stack import AdapterStack, Which
from qlora_jax.errors import InputError
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import linear_parts, linear_shapes
from qlora_jax.placement import in_host
from qlora_jax.process import available
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS

CHOICES = ("auto", "packed", "dense")
SHARE = 4  # of the memory that is left, `auto` takes a quarter at most
WORTH = 16  # tokens from which on dequantizing once takes less than it saves (docs/log.md)


@dataclasses.dataclass(frozen=True)
class ForDecoding:
    """A model as its decoding reads it.

    Attributes:
      model: as it was given, or with dense and joined weights.
      base: as it was given: what adapters were trained on.
      reason: why so, for people.
    """

    model: Decoder
    base: Decoder
    reason: str

    def adapter(
        self, adapter: Adapter | AdapterStack | None, which: Which, rows: int
    ) -> Prepared | None:
        """An adapter, or of a stack each row's own, as decoding reads it.

        Raises:
          InputError: STACK-..., see `Decoder.own_rows`.
        """
        if isinstance(adapter, Adapter) and which is None:
            return prepared(self.model, self.base, adapter)
        return self.model.own_rows(adapter, which, rows)


@jax.jit
def prepared(model: Decoder, base: Decoder, adapter: Adapter) -> Prepared:
    """`prepare` as one program."""
    weights = base.weights() if adapter.spec.use_dora else None
    return prepare(adapter, linear_parts(model.config), model.dtype, weights)


def for_decoding(
    model: Decoder | ForDecoding, weights: str = "auto", tokens: int | None = None
) -> ForDecoding:
    """The model as decoding reads it; the model itself is left as it is.

        fast = for_decoding(model)              # once, then generate(fast, ...) again and again

    Args:
      model: dense or 4-bit; one that is ready already is given back.
      weights: `packed`, as stored; `dense`, dequantized into the model's dtype; `auto`, dense on a
        CPU where that takes at most a quarter of the memory that is left.
      tokens: how many will be decoded; a few are not worth it to `auto`. None for many.

    Raises:
      InputError: GEN-WEIGHTS, another choice, or dense ones of a model whose layers are streamed.
    """
    if weights not in CHOICES:
        raise InputError("GEN-WEIGHTS", "decode_weights", f"{weights!r}", f"one of {CHOICES}")
    if isinstance(model, ForDecoding):
        return model
    streamed = in_host(model.layers)
    if weights == "dense" and streamed:
        found = "dense, and the layers are streamed from host memory"
        raise InputError("GEN-WEIGHTS", "decode_weights", found, "packed")
    if weights == "auto":
        weights, reason = chosen(model, streamed, tokens)
    else:
        reason = "asked for"
    if weights == "packed" or (model.config.fused and not is_packed(model)):
        return ForDecoding(model, model, f"{weights}: {reason}")
    return ForDecoding(dense_and_joined(model), model, f"{weights}: {reason}")


def chosen(model: Decoder, streamed: bool, tokens: int | None) -> tuple[str, str]:
    """What `auto` means, and why."""
    if streamed:
        return "packed", "the layers are streamed"
    if gpu.here() is not None:
        return "packed", "a GPU reads 4 bits as they are stored"
    if tokens is not None and tokens < WORTH:
        return "packed", f"fewer than {WORTH} tokens"
    size, (room, _) = dense_bytes(model), available()
    told = f"{size / 1e9:.2f} GB of {room / 1e9:.1f} GB that are left"
    how = "dequantized" if is_packed(model) else "joined"
    if size * SHARE > room:
        return "packed", f"dense weights would take {told}"
    return "dense", f"{how} once, {told}"


def is_packed(model: Decoder) -> bool:
    """Whether any weight is in 4 bits."""
    return any(isinstance(weight, QuantizedTensor) for weight in model.weights().values())


def dense_bytes(model: Decoder) -> int:
    """Bytes of the layers' linears, and of all else that is in 4 bits, in the model's dtype."""
    each = sum(math.prod(shape) for shape in linear_shapes(model.config).values())
    others = sum(
        math.prod(weight.shape)
        for name, weight in model.weights().items()
        if isinstance(weight, QuantizedTensor) and not name.startswith(LAYERS)
    )
    size = each * model.config.num_hidden_layers + others
    return size * jnp.dtype(model.dtype).itemsize


def dense_and_joined(model: Decoder) -> Decoder:
    """The same model with dense weights, one matrix for all that reads the same input."""
    config, weights = dataclasses.replace(model.config, fused=True), dict(model.weights())
    if model.config.fused:
        config = model.config
    for name, own in linear_parts(config).items():
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{LAYERS}{part}.{kind}", None) for part, _ in own]
            if parts[0] is not None:
                weights[f"{LAYERS}{name}.{kind}"] = joined(parts, model.dtype)
    dense = {
        name: joined([weight], model.dtype) if isinstance(weight, QuantizedTensor) else weight
        for name, weight in weights.items()
    }
    return Decoder.from_weights(config, dense, model.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def joined(parts: list[Array | QuantizedTensor], dtype: str) -> Array:
    """Matrices (L, out, in), or biases (L, out), behind each other along `out`."""
    dense = [
        part.dequantize(dtype) if isinstance(part, QuantizedTensor) else part.astype(dtype)
        for part in parts
    ]
    return jnp.concatenate(dense, axis=min(1, dense[0].ndim - 1)) if len(dense) > 1 else dense[0]

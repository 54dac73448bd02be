"""A step's gradients as a traced program, by shapes alone, and what each layer of it keeps."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import gpu
from pallas_kernels.gpu import Gpu
from pallas_kernels.nf4_matmul import preferred_layout
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.on_top import on_top
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.memory.shapes import adapter_shapes, batch_shapes, decoder, nbytes, weights_of
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layers import vjp
from qlora_jax.models.remat import is_attention
from qlora_jax.placement import HOST
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.step import micro_gradients
from qlora_jax.weight_names import is_streamed


@dataclasses.dataclass(frozen=True)
class Micro:
    """What a micro batch's gradients are taken of.

    Attributes:
      shape: of the model.
      spec: of the adapter.
      quantization: of the base; None for a dense one.
      dtype: of activations and of dense weights.
      rows, length: of the batch.
      target: the GPU that it is for; None for this machine's device.
      frozen: of the sum of the adapters that this one is trained on top of, if any.
    """

    shape: ModelConfig
    spec: LoraSpec
    quantization: QuantizationConfig | None
    dtype: str
    rows: int
    length: int
    target: Gpu | None
    frozen: LoraSpec | None = None

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.rows * self.length

    @property
    def input_bytes(self) -> int:
        """Of one layer's input."""
        return self.tokens * self.shape.hidden_size * jnp.dtype(self.dtype).itemsize


@contextlib.contextmanager
def built_for(target: Gpu | None) -> Iterator[None]:
    """Within it programs are traced for the target."""
    if target is None:
        yield
        return
    with gpu.pretend(target, interpret=False):
        yield


def arguments(micro: Micro, stream_weights: str) -> tuple[Any, Decoder, Any, Any, Any]:
    """(adapter, model, batch, dropout's key or None, frozen adapter or None), as shapes.

    Streamed weights are in host memory.
    """
    layout = preferred_layout()
    all_weights = weights_of(micro.shape, micro.quantization, micro.dtype, layout)
    # Not of a single device: a traced type would forget the memory.
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    host = NamedSharding(mesh, PartitionSpec(), memory_kind=HOST)

    def on_host(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

    weights = {
        name: jax.tree.map(on_host, weight) if is_streamed(name, stream_weights) else weight
        for name, weight in all_weights.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0)) if micro.spec.lora_dropout else None
    return (
        adapter_shapes(micro.spec, micro.shape),
        decoder(micro.shape, weights, micro.dtype),
        batch_shapes(micro.rows, micro.length),
        key,
        micro.frozen and adapter_shapes(micro.frozen, micro.shape),
    )


def gradients(micro: Micro, remat: str) -> Callable[..., Any]:
    """Those of train/step.py as a function of `arguments`; not compiled.

    Not the jitted function itself, whose cache does not know for which GPU it was traced.
    """

    def program(params, model, batch, key, frozen):
        below = frozen and Adapter(frozen, micro.frozen)
        more = {"frozen": below, "dropout_key": key, "remat": remat}
        return micro_gradients(params, model, batch, spec=micro.spec, **more)

    return program


@functools.lru_cache(maxsize=8)  # a run is planned before and after its model is read
def traced(micro: Micro, stream_weights: str, remat: str) -> core.ClosedJaxpr:
    """The gradients of train/step.py; nothing is compiled or allocated.

    Args:
      stream_weights: off, on or all.
      remat: one of models.remat.POLICIES.
    """
    with built_for(micro.target):
        return jax.make_jaxpr(gradients(micro, remat))(*arguments(micro, stream_weights))


@functools.lru_cache(maxsize=8)
def kept_bytes(micro: Micro) -> dict[str, int]:
    """What one layer keeps for the backward pass, by policy; what is offloaded, in host memory.

    One trace tells all: `none` keeps what the layer's own gradient asks for, `save-attention` the
    input and what `is_attention` says of the forward pass.
    """

    def layer_vjp(params, model, batch, key, frozen):
        adapter = Adapter(params, micro.spec)
        if frozen:
            adapter = on_top(Adapter(frozen, micro.frozen), adapter)
        places = batch["positions"], batch["segment_ids"]
        layer, stack = model.stacked(*places, adapter, None, key)
        x = jnp.zeros((micro.rows, micro.length, micro.shape.hidden_size), micro.dtype)
        first = jax.tree.map(lambda leaf: leaf[0], stack[:3])
        _, pullback = vjp(layer, ((x, None), *first, stack.shared))
        # A constant, such as the causal mask, is the same for all layers.
        return [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.core.Tracer)]

    # Not as built for the GPU: what is kept is the same, and its kernels take time to trace.
    program = jax.make_jaxpr(layer_vjp)(*arguments(micro, "off"))
    attention = [
        value.aval
        for equation in equations(program)
        if is_attention(equation.primitive, **equation.params)
        for value in equation.outvars
    ]
    return {
        "none": nbytes(program.out_avals),
        "save-attention": micro.input_bytes + nbytes(attention),
        "full": micro.input_bytes,
        "offload": micro.input_bytes,
    }


def equations(program: Any) -> Iterator[Any]:
    """Every operation of a program, those of its loops and calls included."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                if hasattr(getattr(part, "jaxpr", part), "eqns"):
                    yield from equations(part)


def operations(program: Any) -> int:
    """How many operations a program has."""
    return sum(1 for _ in equations(program))

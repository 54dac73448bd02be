"""Adapter matrices as a pass without gradients reads them: cast, scaled and joined beforehand.

An adapter is read in float32, B is transposed and multiplied by the scale, and thin matrices that
read the same input are products of their own. Done once, that costs nothing a token:

    q_proj, k_proj, v_proj      one product with A (3 r, in), then one with B^T (r, out) each
    eight rows, eight adapters  A (8, 3 r, in), B^T (8, r, out): what other rows use is not read
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.dora import row_norms, row_squares, stretch
from qlora_jax.adapters.spec import SAVED
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS

# Of a linear: (out, whether it is adapted) of each matrix that it was joined from, in order.
Segments = tuple[tuple[int, bool], ...]
# Of each linear of a model: (name, out) of each matrix that it was joined from; itself if of none.
Parts = Mapping[str, tuple[tuple[str, int], ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """One adapter for all rows, or one for each row; a pytree without anything to train.

        y = W x + B^T' (A x)         scale within B^T; DoRA: the sum times `ratio`

    Attributes:
      linears: by name: A (L, *B, n r, in), where n of the matrices that the linear was joined from
        are adapted, and Bt, of each of the n (L, *B, r, out); DoRA has ratio (L, out) too.
      whole: lm_head and embed_tokens that were trained in full, (V, D).
      segments: by name, what the linear was joined from; static.
    """

    linears: dict[str, dict[str, Array | tuple[Array, ...]]]
    whole: dict[str, Float[Array, "V D"]]
    segments: tuple[tuple[str, Segments], ...] = dataclasses.field(metadata={"static": True})

    def saved(self, name: str) -> Float[Array, "V D"] | None:
        """What was trained in full in place of lm_head or embed_tokens."""
        return self.whole.get(name)


def prepare(
    adapter: Adapter,
    parts: Parts,
    dtype: str,
    weights: Mapping[str, Array | QuantizedTensor] | None = None,
) -> Prepared:
    """An adapter for reading, in `dtype`.

    Args:
      adapter: of a model with these linears, or with those that they were joined from.
      parts: of each linear of the model that reads, what it was joined from.
      dtype: of the activations.
      weights: the model's by stacked name, before anything was joined; for DoRA alone.
    """
    pairs, ratios = {}, {}
    for name in adapter.spec.targets:
        own = adapter.params[name]
        scales = jnp.asarray(adapter.spec.scales(name))
        pairs[name] = own["A"], own["B"].swapaxes(1, 2) * scales[:, None, None]
        if adapter.spec.use_dora:
            weight = weights[f"{LAYERS}{name}.weight"]
            ratios[name] = jax.lax.map(ratio_of, (weight, own["A"], own["B"], scales, own["m"]))
    whole = {name: adapter.params[name]["weight"] for name in SAVED if name in adapter.params}
    return join(pairs, ratios, whole, parts, dtype)


def join(
    pairs: Mapping[str, tuple[Array, Array]],
    ratios: Mapping[str, Array],
    whole: dict[str, Array],
    parts: Parts,
    dtype: str,
) -> Prepared:
    """Matrices A (L, *B, r, in) and B^T (L, *B, r, out) by target, as the model's linears take."""
    linears, segments = {}, []
    for name, own in parts.items():
        adapted = [part for part, _ in own if part in pairs]
        if not adapted:
            continue
        rank = max(pairs[part][0].shape[-2] for part in adapted)
        A, Bt = ([padded(pairs[part][i], rank) for part in adapted] for i in (0, 1))
        linears[name] = {
            "A": jnp.concatenate(A, axis=-2).astype(dtype),
            "Bt": tuple(matrix.astype(dtype) for matrix in Bt),
        }
        if ratios:
            ones = {part: jnp.ones((len(A[0]), out)) for part, out in own}
            each = [(ones | dict(ratios))[part] for part, _ in own]
            linears[name]["ratio"] = jnp.concatenate(each, axis=-1)
        segments.append((name, tuple((out, part in pairs) for part, out in own)))
    return Prepared(linears, whole, tuple(segments))


def padded(matrix: Float[Array, "*lead r n"], rank: int) -> Float[Array, "*lead rank n"]:
    """The matrix with rows of zeros up to `rank`."""
    lead = [(0, 0)] * (matrix.ndim - 2)
    return jnp.pad(matrix, [*lead, (0, rank - matrix.shape[-2]), (0, 0)])


def ratio_of(layer: tuple) -> Float[Array, " out"]:
    """DoRA's m / n of one layer; its W is dense while this runs."""
    weight, A, B, scale, m = layer
    W = weight.dequantize("float32") if isinstance(weight, QuantizedTensor) else weight
    AW = jnp.matmul(A, W.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return stretch(m, row_norms(row_squares(weight), AW, A, B.T, scale), scale)

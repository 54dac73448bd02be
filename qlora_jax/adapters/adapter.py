"""An adapter: a tree of arrays to train, and what is fixed about them."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.adapters.spec import SAVED, LoraSpec, module_path
from qlora_jax.errors import InputError

Params = dict[str, dict[str, Float[Array, "..."]]]
# (out, in) of each linear of one layer, by its name inside the layer; (V, D) of lm_head and
# embed_tokens.
Shapes = Mapping[str, tuple[int, int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA matrices for some linears of a model; a pytree whose leaves are what is trained.

        y = W x + scale * B A x        scale = spec.scales(name)[layer]

    Layers of unequal rank are padded with zeros to the largest: rows of A, columns of B, and m of a
    layer without an adapter. They stay zero in training: each one's gradient is a product with the
    other, and that of such an m is zero.

        {"self_attn.q_proj": {"A": (L, r, in), "B": (L, out, r)}, ...   one for each of spec.targets
                             "m": (L, out)                              DoRA's lengths of rows
         "lm_head": {"weight": (V, D)}}                                 spec.modules_to_save

    Args:
      params: as drawn, float32.
      spec: targets, ranks, scales and dropout; static, so that no optimizer can move a scale.
    """

    params: Params
    spec: LoraSpec = dataclasses.field(metadata={"static": True})

    @property
    def num_parameters(self) -> int:
        """How many numbers it has, padding not counted."""
        return count_parameters(self.spec, self.shapes)

    @property
    def shapes(self) -> Shapes:
        """Of the modules that it adapts or holds."""
        params = self.params
        linears = {n: (params[n]["B"].shape[1], params[n]["A"].shape[2]) for n in self.spec.targets}
        return linears | {n: params[n]["weight"].shape for n in self.spec.modules_to_save}

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays as they lie in memory, padding counted."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    def saved(self, name: str) -> Float[Array, "V D"] | None:
        """What is trained in full in place of lm_head or embed_tokens; None where it is not."""
        return self.params[name]["weight"] if name in self.params else None

    def layer(self, name: str, index: int) -> tuple[Array, Array]:
        """A (r, in) and B (out, r) of target `name` in layer `index`, padding cut off."""
        rank = self.spec.ranks(name)[index]
        pair = self.params[name]
        return pair["A"][index, :rank], pair["B"][index, :, :rank]


def param_shapes(spec: LoraSpec, shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of each array of an adapter's `params`.

    Args:
      spec: what is adapted.
      shapes: of at least the modules that `spec` names.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in spec.targets:
        (out, width), layers, rank = shapes[name], spec.num_layers, max(spec.ranks(name))
        found[name] = {"A": (layers, rank, width), "B": (layers, out, rank)}
        if spec.use_dora:
            found[name]["m"] = (layers, out)
    return found | {name: {"weight": shapes[name]} for name in spec.modules_to_save}


def count_parameters(spec: LoraSpec, shapes: Shapes) -> int:
    """How many numbers an adapter trains; `shapes` as of `param_shapes`."""
    total = sum(math.prod(shapes[name]) for name in spec.modules_to_save)
    for name in spec.targets:
        ranks, (out, width) = spec.ranks(name), shapes[name]
        total += sum(ranks) * (out + width) + spec.use_dora * np.count_nonzero(ranks) * out
    return int(total)


def check_finite(adapter: Adapter) -> None:
    """Refuses an adapter with NaN or infinity, naming the first array that has one."""
    for name, arrays in adapter.params.items():
        for kind, stacked in arrays.items():
            bad = np.argwhere(~np.isfinite(np.asarray(stacked)))
            if not len(bad):
                continue
            value, index = np.asarray(stacked)[tuple(bad[0])], bad[0].tolist()
            if name in SAVED:
                where = f"{SAVED[name]}.{kind}"
            else:
                where = f"{module_path(index.pop(0), name)}.lora_{kind}"
            raise InputError("LORA-FINITE", where, f"{value} at {index}, not finite")

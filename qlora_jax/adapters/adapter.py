"""An adapter: a tree of A and B matrices to train, and what is fixed about them."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.adapters.spec import LoraSpec, module_path
from qlora_jax.errors import InputError

Params = dict[str, dict[str, Float[Array, "L ..."]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA matrices for some linears of a model; a pytree whose only leaves are A and B.

        y = W x + scale * B A x        scale = spec.scales(name)[layer]

    Layers of unequal rank are padded with zeros to the largest: rows of A, columns of B. They stay
    zero in training, since each one's gradient is a product with the other.

    Args:
      params: `{"self_attn.q_proj": {"A": (L, r, in), "B": (L, out, r)}, ...}`, float32, one entry
        for each of `spec.targets`.
      spec: targets, ranks, scales and dropout; static, so that no optimizer can move a scale.
    """

    params: Params
    spec: LoraSpec = dataclasses.field(metadata={"static": True})

    @property
    def num_parameters(self) -> int:
        """How many numbers it has, padding not counted."""
        sizes = {name: p["A"].shape[2] + p["B"].shape[1] for name, p in self.params.items()}
        return sum(sum(self.spec.ranks(name)) * size for name, size in sizes.items())

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays as they lie in memory, padding counted."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    def layer(self, name: str, index: int) -> tuple[Array, Array]:
        """A (r, in) and B (out, r) of target `name` in layer `index`, padding cut off."""
        rank = self.spec.ranks(name)[index]
        pair = self.params[name]
        return pair["A"][index, :rank], pair["B"][index, :, :rank]


def check_finite(adapter: Adapter) -> None:
    """Refuses an adapter with NaN or infinity, naming the first matrix that has one."""
    for name, pair in adapter.params.items():
        for matrix, stacked in pair.items():
            bad = np.argwhere(~np.isfinite(np.asarray(stacked)))
            if len(bad):
                layer, *index = bad[0].tolist()
                where = f"{module_path(layer, name)}.lora_{matrix}"
                value = np.asarray(stacked)[layer, *index]
                raise InputError("LORA-FINITE", where, f"{value} at {index}, not finite")

"""The GPU backends by name, imported when there is a GPU to ask them for."""

import dataclasses
import importlib
from types import ModuleType

from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.nf4_matmul.weight import LowRank, Weight


@dataclasses.dataclass(frozen=True)
class OnGpu:
    """A backend's module that is not imported where it cannot run: Mosaic takes 0.3 s to import.

    It has one function, product(x, w, low, *, transposed): x W^T, or x W when `transposed`, both
    + h b when `low` is not None.
    """

    name: str

    def module(self) -> ModuleType:
        """The module; Unsupported where there is no GPU."""
        gpu.require()
        return importlib.import_module(f"pallas_kernels.nf4_matmul.{self.name}")

    def forward(
        self, x: Float[Array, "M in"], w: Weight, low: LowRank | None = None
    ) -> Float[Array, "M out"]:
        """x W^T (+ h b)."""
        return self.module().product(x, w, low, transposed=False)

    def backward(
        self, dy: Float[Array, "M out"], w: Weight, low: LowRank | None = None
    ) -> Float[Array, "M in"]:
        """dy W (+ h b)."""
        return self.module().product(dy, w, low, transposed=True)

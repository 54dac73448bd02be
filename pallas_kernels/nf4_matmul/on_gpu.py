"""The GPU backends by name, imported when there is a GPU to ask them for."""

import dataclasses
import importlib
from types import ModuleType

import jax
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul.weight import LowRank, Weight


@dataclasses.dataclass(frozen=True)
class OnGpu:
    """A backend's module that is not imported where it cannot run: Mosaic takes 0.3 s to import."""

    name: str

    def module(self) -> ModuleType:
        """The module; Unsupported where there is no GPU."""
        if gpu.here() is None:
            raise Unsupported(f"the default device is a {jax.default_backend()}, not a GPU")
        return importlib.import_module(f"pallas_kernels.nf4_matmul.{self.name}")

    def forward(
        self, x: Float[Array, "M in"], w: Weight, low: LowRank | None = None
    ) -> Float[Array, "M out"]:
        """x W^T (+ h b)."""
        return self.module().forward(x, w, low)

    def backward(
        self, dy: Float[Array, "M out"], w: Weight, low: LowRank | None = None
    ) -> Float[Array, "M in"]:
        """dy W (+ h b)."""
        return self.module().backward(dy, w, low)

"""What a model family does to its attention scores: their scale, a soft cap, a window."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Scores(NamedTuple):
    """How q k^T becomes scores, and which keys one sees; static.

    Attributes:
      scale: what q k^T is multiplied by; None for 1 / sqrt(head_dim).
      softcap: c of c * tanh(score / c); None for none.
      window: how many tokens a token sees, itself included; None for all before it.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def scale_of(self, head_dim: int) -> float:
        """The scale, for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def of(self, products: Float[Array, "..."], head_dim: int) -> Float[Array, "..."]:
        """The scores that are q k^T, float32: scaled, then capped."""
        scores = products * np.float32(self.scale_of(head_dim))
        return scores if self.softcap is None else jnp.tanh(scores / self.softcap) * self.softcap

    def seen(
        self, back: Int[Array | np.ndarray, "..."], window: Int[Array, ""] | None = None
    ) -> Bool[Array | np.ndarray, "..."]:
        """Whether a token sees the one `back` tokens before it.

        Args:
          window: one that is known only as this runs, beside our own.
        """
        seen = back >= 0
        for width in (self.window, window):
            seen = seen if width is None else seen & (back < width)
        return seen

    def first_key(self, row: int) -> int:
        """The first key that `row` sees."""
        return 0 if self.window is None else max(0, row - self.window + 1)


PLAIN = Scores()

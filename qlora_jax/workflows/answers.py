"""What a model answers to a text, in float32: some logits to compare, and the loss of all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.models import Decoder

TOKENS = 64  # compared positions of a row: its last ones, which have seen most
ROWS = 2  # compared rows


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says to windows of token ids.

    Attributes:
      logits: (TOKENS or fewer, V) of each of the first rows.
      perplexity: exp of the mean -log p of every token but each row's first.
      targets: how many tokens that is.
    """

    logits: list[Float[np.ndarray, "tokens V"]]
    perplexity: float
    targets: int


def answers(model: Decoder, ids: Int[np.ndarray, "N S"], adapter: Adapter | None) -> Answers:
    """The model's answers, row by row, computed in float32: the weights' rounding is all."""
    # Weights as they are, which costs no copy of them in float32.
    wide = Decoder.from_weights(model.config, model.weights(), "float32")
    kept, total = [], 0.0
    for row in ids:
        logits, loss = row_of(wide, row[None], adapter)
        total += float(loss)
        if len(kept) < ROWS:
            kept.append(np.asarray(logits))
    targets = ids.shape[0] * (ids.shape[1] - 1)
    return Answers(kept, float(np.exp(np.float64(total / targets))), targets)


@jax.jit
def row_of(
    model: Decoder, ids: Int[Array, "1 S"], adapter: Adapter | None
) -> tuple[Float[Array, "tokens V"], Float[Array, ""]]:
    """The last logits of a row, and the sum of -log p over its targets."""
    logits = model(ids, adapter=adapter)[0]
    right = jnp.take_along_axis(logits[:-1], ids[0, 1:, None], axis=1)[:, 0]
    return logits[-TOKENS:], (jax.nn.logsumexp(logits[:-1], axis=-1) - right).sum()

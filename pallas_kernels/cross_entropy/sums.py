"""CrossEntropy: what every form of the loss answers."""

from typing import NamedTuple

from jaxtyping import Array, Float


class CrossEntropy(NamedTuple):
    """Sums over the counted targets, float32 scalars."""

    loss: Float[Array, ""]  # of -log p(label), in nats
    right: Float[Array, ""]  # targets whose logit is the largest

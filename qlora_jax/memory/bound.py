"""The time that a step cannot be faster than, and what bounds it: computing, memory, or the link.

    compute   2 flops a token and weight forward, 2 backward (the base has no gradient), 2 more for
              what is computed again; attention's products; the head, once each way
    memory    weights once in each pass, activations written and read once
    link      streamed weights once forward and once backward, layer inputs there and back, pages of
              optimizer state there and back; the two directions are apart, the busier one counts
    disk      layers from disk, once in each pass

If all of it overlaps, the longest is the step. Nothing was measured: a GPU is slower than that.
"""

import dataclasses

from qlora_jax.memory.estimate import Estimate
from qlora_jax.memory.gpus import Card
from qlora_jax.memory.program import Micro
from qlora_jax.models.families import linear_shapes

DISK = 3e9  # bytes a second, reading files in order from an NVMe drive of PCI Express 3.0


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that each resource is busy in one optimizer step.

    Attributes:
      seconds: by resource.
      hidden_from: tokens of a micro batch from which copies take no longer than computing; None
        where nothing is streamed.
    """

    seconds: dict[str, float]
    hidden_from: int | None

    @property
    def step_seconds(self) -> float:
        """Of the busiest."""
        return max(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """The busiest."""
        return max(self.seconds, key=self.seconds.__getitem__)


def bound(estimate: Estimate, micro: Micro, accumulation: int, card: Card) -> Bound | None:
    """The bound on a card whose rates are known; None for a size."""
    if card.flops is None:
        return None
    policy, tokens = estimate.choices.gradient_checkpointing, micro.tokens
    again = policy != "none"
    shape = micro.shape
    layers = shape.num_hidden_layers
    weights = layers * sum(out * width for out, width in linear_shapes(shape).values())
    heads = shape.num_attention_heads * shape.head_dim
    # Two products over the earlier half of the tokens; five backward, two of them scores again.
    attention = layers * 4 * sum(shape.reach(micro.length)) / layers / 2 * heads
    attention *= 3.5 + (policy in ("full", "offload"))
    head = 4 * shape.vocab_size * shape.hidden_size
    flops = tokens * (weights * (4 + 2 * again) + attention + head)
    moved = weights / 2 * (2 + again) + 2 * (estimate.device["activations"] + estimate.kept)
    # To the device: weights twice, inputs and pages back; from it: inputs and pages.
    link = 2 * estimate.streamed + estimate.kept
    seconds = {
        "compute": accumulation * flops / card.flops,
        "memory": accumulation * moved / card.bandwidth,
        "link": (accumulation * link + estimate.paged) / card.link,
    }
    if estimate.choices.stream_weights == "disk":
        seconds["disk"] = accumulation * 2 * estimate.streamed / DISK
    hidden = None
    if estimate.streamed:
        per_token = (flops / card.flops - estimate.kept / card.link) / tokens
        rate = DISK if estimate.choices.stream_weights == "disk" else card.link
        hidden = -int(-2 * estimate.streamed / rate // per_token) if per_token > 0 else None
    return Bound(seconds, hidden)

"""One layer as a function, and what it takes of the program around it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.prepared import Prepared, Segments
from qlora_jax.models.attention import Context
from qlora_jax.models.block import Block
from qlora_jax.models.cache import KVCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.layers import apart
from qlora_jax.models.linear import Branch, Branches, PreparedBranch
from qlora_jax.models.scores import Scores

Rotation = tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
Carry = tuple[Float[Array, "B S D"], KVCache | None]


@dataclasses.dataclass(frozen=True)
class OneLayer:
    """A layer from (x, cache) to the next layer's: pure, and equal for equal settings.

    Attributes:
      scores: what all layers share of how they attend.
      dropout: of the adapter.
      segments: of a prepared adapter; see there.
    """

    scores: Scores
    dropout: float = 0.0
    segments: tuple[tuple[str, Segments], ...] = ()

    def __call__(
        self, carry: Carry, block: Block, params: Any, others: "Others", shared: "Shared"
    ) -> Carry:
        (x, cache), (index, kind, scales, key) = carry, others
        context = of_layer(shared, kind, self.scores)
        if self.segments:
            own = prepared_branches(params, self.segments)
        else:
            own = branches(params, scales, self.dropout, key)
        return block(x, context, own, cache, index)


class Kinds(NamedTuple):
    """What differs between the layers of one program, by layer; None where nothing does.

    Attributes:
      local: whether a layer has the rotation of those with a window.
      window: how many tokens one sees, itself included.
    """

    local: Bool[Array | np.ndarray, "*L"] | None
    window: Int[Array | np.ndarray, "*L"] | None


def kinds(config: ModelConfig, room: int) -> Kinds:
    """What differs between the layers of a model, over texts of at most `room` tokens."""
    local = np.array([width is not None for width in config.windows])
    reach = np.array(config.reach(room), np.int32)
    differ = reach.min() < reach.max()
    return Kinds(local if config.local_rope else None, reach if differ else None)


class Others(NamedTuple):
    """What each layer has of its own beside weights and adapter; every leaf has an axis L.

    Attributes:
      index: 0, 1, 2 ...
      kind: how it differs from other layers.
      scales: an adapter's, by the name of the linear.
      key: for dropout; None in evaluation.
    """

    index: Int[Array, "*L"]
    kind: "Kinds"
    scales: dict[str, Float[Array, "*L"]]
    key: Array | None


class Shared(NamedTuple):
    """What all layers of one program see.

    Attributes:
      far: the rotation, cos and sin.
      near: that of layers with a window, where they have one of their own.
      segment_ids: as of `Decoder`.
    """

    far: Rotation
    near: Rotation | None
    segment_ids: Int[Array, "B S"] | None


def of_layer(shared: Shared, kind: Kinds, scores: Scores) -> Context:
    """One layer's context: its rotation and its window, where layers differ in them."""
    cos, sin = shared.far
    if kind.local is not None:
        pairs = zip(shared.near, shared.far, strict=True)
        cos, sin = (jnp.where(kind.local, near, far) for near, far in pairs)
    return Context(cos, sin, shared.segment_ids, scores, kind.window)


def branches(params: Any, scales: Any, dropout: float, key: Array | None) -> Branches:
    """One layer's part of an adapter, by the name of the linear that it belongs to.

    A B that is not transposed already is transposed here, apart from the products: XLA on a CPU
    would make the two one product in float32.
    """
    branches = {}
    for index, (name, pair) in enumerate(sorted(params.items())):
        own = None if key is None else jax.random.fold_in(key, index)
        magnitude = pair.get("m")
        Bt = pair["Bt"] if "Bt" in pair else apart(pair["B"].T)
        branches[name] = Branch(pair["A"], Bt, scales[name], dropout, own, magnitude)
    return branches


def prepared_branches(params: Any, segments: tuple[tuple[str, Segments], ...]) -> Branches:
    """One layer's part of a prepared adapter, by the name of the linear that it belongs to."""
    found: Branches = {}
    for name, own in segments:
        pair = params[name]
        found[name] = PreparedBranch(pair["A"], pair["Bt"], own, pair.get("ratio"))
    return found


def layer_params(adapter: Adapter | Prepared | None, streamed: bool) -> dict[str, dict[str, Array]]:
    """What the layers take of an adapter: its targets' arrays, by the name of the linear.

    B is transposed to (r, out) for all layers in one pass, see lora_delta. That takes the memory of
    all B once more and of all their gradients, so where weights are streamed each layer does it.
    """
    if adapter is None:
        return {}
    if isinstance(adapter, Prepared):
        return adapter.linears
    params = {name: dict(adapter.params[name]) for name in adapter.spec.targets}
    if not streamed:
        for own in params.values():
            own["Bt"] = own.pop("B").swapaxes(1, 2)
    return params

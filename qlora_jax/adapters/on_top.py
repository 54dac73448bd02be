"""An adapter that is trained on top of another, which stays as it is.

    y = W x + F x + s B A x        F is the frozen adapter's delta; the gradient is that of A and B

The two are one adapter of the sum of their ranks, joined anew in each step: the base is not copied,
and `compose` with cat writes what was computed here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.adapters.adapter import Adapter, Params
from qlora_jax.adapters.composed_spec import composed_spec, union_of_targets


def on_top(frozen: Adapter, adapter: Adapter) -> Adapter:
    """Both as one adapter of scale 1, without a gradient for `frozen`; also under jit.

    Args:
      frozen: of the same model, LoRA alone.
      adapter: LoRA alone, without dropout: that would drop inputs of `frozen` too.
    """
    below = Adapter(jax.lax.stop_gradient(frozen.params), frozen.spec)
    params: Params = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for name in union_of_targets([frozen.spec, adapter.spec]):
        pairs = [folded(one, name) for one in (below, adapter) if name in one.spec.targets]
        rows, columns = zip(*pairs, strict=True)
        A, B = jnp.concatenate(rows, 1), jnp.concatenate(columns, 2)
        params[name] = {"A": A, "B": B}
        ranks[name] = (A.shape[1],) * A.shape[0]
    return Adapter(params, composed_spec(ranks))


def folded(adapter: Adapter, name: str) -> tuple[Array, Array]:
    """A (L, r, in) times the scale, and B (L, out, r)."""
    pair = adapter.params[name]
    return pair["A"] * adapter.spec.scales(name)[:, None, None], pair["B"]

"""What 4 bits lost of a merge, as an adapter of low rank beside the result.

    E = W + scale B A - Q        the nearest matrix of rank r to E is U U^T E
    U (out, r)                   the first eigenvectors of E H E^T

H are the second moments of the linear's inputs, so that "nearest" is by its outputs; without them
it is by its weights: E's truncated singular value decomposition, low_rank.py.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from qlora_jax.adapters.adapter import Adapter, Shapes, param_shapes
from qlora_jax.adapters.low_rank import low_rank
from qlora_jax.adapters.spec import make_spec


def residual_pair(
    error: Float[np.ndarray, "out in"],
    rank: int,
    moments: Float[np.ndarray, "in in"] | None = None,
) -> tuple[Float[np.ndarray, "rank in"], Float[np.ndarray, "out rank"]]:
    """(A, B), float32, with B A the nearest matrix of `rank` to `error`.

    Args:
      error: what is made up for.
      rank: where it is more than `error` has, the rest is zeros.
      moments: of the inputs; None takes all inputs alike.
    """
    out, width = error.shape
    found = min(rank, out, width)
    A, B = np.zeros((rank, width), np.float32), np.zeros((out, rank), np.float32)
    if moments is None:
        A[:found], B[:, :found] = low_rank(error, found, 1.0)
        return A, B
    wide = error.astype(np.float64)
    costs = wide @ (wide @ moments.astype(np.float64)).T
    _, vectors = eigh(costs, subset_by_index=(out - found, out - 1), overwrite_a=True)
    B[:, :found] = vectors[:, ::-1]
    A[:found] = vectors[:, ::-1].T @ wide
    return A, B


def residual_adapter(
    pairs: Mapping[tuple[str, int], tuple[np.ndarray, np.ndarray]], shapes: Shapes, layers: int
) -> Adapter:
    """The adapter that adds B A of each (target, layer); those that are not named add nothing.

    Args:
      pairs: (A, B) of one rank.
      shapes: of the model's modules.
      layers: how many it has.
    """
    targets = list(dict.fromkeys(target for target, _ in pairs))
    rank = len(next(iter(pairs.values()))[0])
    spec = make_spec(shapes, layers, r=rank, alpha=rank, targets=targets)
    arrays = {
        name: {kind: np.zeros(shape, np.float32) for kind, shape in own.items()}
        for name, own in param_shapes(spec, shapes).items()
    }
    for (target, layer), (A, B) in pairs.items():
        arrays[target]["A"][layer], arrays[target]["B"][layer] = A, B
    params = {
        name: {kind: jnp.asarray(array) for kind, array in own.items()}
        for name, own in arrays.items()
    }
    return Adapter(params, spec)

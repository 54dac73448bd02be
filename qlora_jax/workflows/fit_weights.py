"""The weights of a composition by principle: those with the least loss on held-out text.

    half of the data    the weights are found on it: L-BFGS-B on the loss and its gradient
    the other half      tells what base, each adapter, equal weights and the fitted ones lose

The adapters are concatenated once. Inside the jitted loss each one's rows of A are multiplied by
its weight, so the base, a single adapter and every step of the search are the same program:

    y = W x + sum_i w_i s_i B_i A_i x          w_i a number, or one for each layer

Text that the adapters were trained on would favour those that know it by heart: give held-out text.
Source of L-BFGS-B: Byrd, Lu, Nocedal and Zhu 1995, by way of SciPy.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.adapters.adapter import Adapter, Params
from qlora_jax.adapters.composable import Weights, check_kinds, weights_by_layer
from qlora_jax.adapters.compose import compose
from qlora_jax.adapters.parts import row_owners
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.data.dataset import Dataset, shuffled
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.evaluation.perplexity import batches_of
from qlora_jax.models import Decoder
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.loss import Batch, loss_fn
from qlora_jax.workflows.room import laid_out_for

TOKENS = 2048  # of each half that are used, where nobody says
LENGTH = 256  # tokens of a window or row, where nobody says: many short ones are of more kinds
FIRST_STEP = 0.25  # how far each weight moves at first, in the mean square
SMALLEST_GAIN = 5e-5  # of the loss, relative: a step that gains less is the last
SMALLEST_SLOPE = 1e-2  # nats for a weight of 1 more: with a curvature near 1, 1e-4 nats are left
MOST_LOSSES = 40  # evaluations of loss and gradient, after which no new step begins
MOST_TRIALS = 8  # evaluations in one step

Owners = dict[str, Int[np.ndarray, "L r"]]


@dataclasses.dataclass(frozen=True)
class FittedWeights:
    """The weights that were found, and what they are worth on text that they were not fitted to.

    Attributes:
      weights: by the adapters' names: a number, or one for each layer; what `compose` takes.
      base: loss of the base alone on the second part; nats a token, as all losses here.
      single: of each adapter alone, its weight 1.
      uniform: of equal weights, 1 / n each.
      given: of the weights that the search began at; None if these were the uniform ones.
      fitted: of the fitted weights.
      targets: predicted tokens of the second part.
      fitted_on: predicted tokens of the first.
      losses: how often loss and gradient were computed.
    """

    weights: dict[str, float | list[float]]
    base: float
    single: dict[str, float]
    uniform: float
    given: float | None
    fitted: float
    targets: int
    fitted_on: int
    losses: int

    @property
    def rows(self) -> list[tuple[str, float]]:
        """(what, loss on the second part) of all that was compared."""
        given = [] if self.given is None else [("weights as given", self.given)]
        single = list(self.single.items())
        uniform = (f"uniform, 1/{len(single)} each", self.uniform)
        return [("base", self.base), *single, uniform, *given, ("fitted", self.fitted)]

    @property
    def best_other(self) -> tuple[str, float]:
        """The best of the rest."""
        return min(self.rows[:-1], key=lambda row: row[1])


def fit_weights(
    model: Decoder,
    adapters: Mapping[str, Adapter],
    data: Dataset | np.ndarray,
    *,
    start: Weights | None = None,
    per_layer: bool = False,
    free: bool = False,
    tokens: int = TOKENS,
    batch_size: int = 1,
    remat: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FittedWeights:
    """Finds the weights of a `cat` composition that lose least on held-out text.

        found = fit_weights(model, {"a": a, "b": b}, windows(ids, 256))
        both = compose({"a": a, "b": b}, found.weights)

    Args:
      model: the base that all adapters were trained on, quantized as then.
      adapters: by name.
      data: windows (N, S) of token ids, or a Dataset: rows from all over it are taken, each for one
        half or the other.
      start: where the search begins; by default 1 / n each.
      per_layer: one weight for each adapter and layer; wants more text.
      free: weights may be negative; otherwise 0 is the least.
      tokens: of each half that are used at most; more of it is slower and surer.
      batch_size: rows at a time.
      remat: what layers keep for the gradient, one of remat.POLICIES; by default as a run's plan.
      seed: says which row is for which half.
      progress: called with (losses so far, the most there can be) after each.

    Raises:
      InputError: FIT-DATA, too little text for two halves; FIT-START; COMPOSE-..., what `compose`
        refuses.
      NonFinite: FIT-NAN, a loss is NaN or infinite.
    """
    check_kinds(adapters)  # one alone, too: its A and B are not all that it is
    both = compose(adapters, dict.fromkeys(adapters, 1.0))
    uniform = dict.fromkeys(adapters, 1 / len(adapters))
    begin = weights_by_layer(adapters, uniform if start is None else start)
    layers = both.spec.num_layers if per_layer else 1
    first = np.stack([row if per_layer else row[:1] for row in begin.values()])
    if not per_layer and any(np.ptp(row) for row in begin.values()):
        raise InputError("FIT-START", "start", "a weight for each layer", "one for each adapter")
    if not free and first.min() < 0:
        found, hint = f"{first.min():g}", "--free for weights that may be negative"
        raise InputError("FIT-START", "weights to begin at", found, "0 or more", hint)
    parts = [
        list(batches_of(part, batch_size, model.config.vocab_size)[0])
        for part in halves(data, tokens, seed)
    ]
    if remat is None:
        length = max(batch["input_ids"].shape[1] for part in parts for batch in part)
        config = TrainConfig(batch_size=batch_size)
        remat = laid_out_for(model, both, config, length).choices.gradient_checkpointing
    loss = Loss(model, both, row_owners(adapters), remat)
    w, count = minimized(loss, parts[0], first, free, progress)

    def told(weights: np.ndarray) -> float:
        return loss(np.broadcast_to(weights, (len(adapters), layers)), parts[1])

    single = np.eye(len(adapters))[:, :, None]
    return FittedWeights(
        weights={
            name: row.tolist() if per_layer else float(row[0])
            for name, row in zip(adapters, w, strict=True)
        },
        base=told(np.zeros((len(adapters), 1))),
        single=dict(zip(adapters, map(told, single), strict=True)),
        uniform=told(np.full((len(adapters), 1), 1 / len(adapters))),
        given=None if np.ptp(first) == 0 and first[0, 0] == 1 / len(adapters) else told(first),
        fitted=told(w),
        targets=loss.count(parts[1]),
        fitted_on=loss.count(parts[0]),
        losses=count,
    )


def halves(data: Dataset | np.ndarray, tokens: int, seed: int) -> list[Dataset | np.ndarray]:
    """Two parts of at most so many tokens, no row in both: from all over the data, at random.

    Neighbours go one to each part, so that both have a text's kinds in equal shares.

    Raises:
      InputError: FIT-DATA.
    """
    if isinstance(data, Dataset):
        sources = list(dict.fromkeys(sequence.where for sequence in data.sequences))
        rows = len(sources)
    else:
        rows = len(data)
    if rows < 2:
        found, expected = f"{rows} row or window", "two at least, to fit on and to tell by"
        raise InputError("FIT-DATA", "data", found, expected, "more text, or a smaller --seq-len")
    size = sum(data.row_lengths) / rows if isinstance(data, Dataset) else data.shape[1]
    count = max(1, min(rows // 2, int(tokens / size)))
    taken = np.linspace(0, rows - 1, 2 * count).round().astype(int).reshape(count, 2)
    turned = shuffled(count, seed) % 2
    parts = [np.where(turned == side, taken[:, 0], taken[:, 1]) for side in (0, 1)]
    if not isinstance(data, Dataset):
        return [data[part] for part in parts]
    wanted = [{sources[row] for row in part} for part in parts]
    return [data.only(names.__contains__) for names in wanted]


@functools.partial(jax.jit, static_argnames=("spec", "remat"))
def weighted_loss(
    weights: Float[Array, "n L"],
    params: Params,
    owners: dict[str, Int[Array, "L r"]],
    model: Decoder,
    batch: Batch,
    *,
    spec: LoraSpec,
    remat: str,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`loss_fn` with each row of A times the weight of the adapter that it comes from."""
    scaled = {
        name: {
            "A": pair["A"] * jnp.take_along_axis(weights.T, owners[name], axis=1)[..., None],
            "B": pair["B"],
        }
        for name, pair in params.items()
    }
    return loss_fn(scaled, model, batch, spec=spec, remat=remat)


slope = jax.jit(jax.value_and_grad(weighted_loss, has_aux=True), static_argnames=("spec", "remat"))


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean loss of the concatenated adapters as a function of their weights.

    Attributes:
      model: the base.
      adapter: all adapters concatenated, each with weight 1.
      owners: which adapter a row of A comes from.
      remat: what layers keep for the gradient.
    """

    model: Decoder
    adapter: Adapter
    owners: Owners
    remat: str

    def __call__(self, weights: np.ndarray, batches: list[dict[str, np.ndarray]]) -> float:
        """The mean over all targets of `batches`; weights (n, 1) or (n, L)."""
        sums = [self.run(weighted_loss, weights, batch) for batch in batches]
        return self.mean(sums)

    def with_slope(
        self, weights: np.ndarray, batches: list[dict[str, np.ndarray]]
    ) -> tuple[float, np.ndarray]:
        """The mean loss and its gradient, float64, of the shape of `weights`."""
        sums, total = [], 0
        for batch in batches:
            both, gradient = self.run(slope, weights, batch)
            sums.append(both)
            total = total + np.asarray(gradient, np.float64)
        gradient = total / sum(int(count) for _, count in sums)
        if weights.shape[1] == 1:
            gradient = gradient.sum(1, keepdims=True)
        return self.mean(sums), gradient

    def run(self, program: Callable, weights: np.ndarray, batch: dict[str, np.ndarray]) -> Any:
        """One batch; weights are always one a layer, so that there is one program."""
        shape = len(weights), self.adapter.spec.num_layers
        own = jnp.asarray(np.broadcast_to(weights, shape), jnp.float32)
        params, spec = self.adapter.params, self.adapter.spec
        return program(own, params, self.owners, self.model, batch, spec=spec, remat=self.remat)

    def mean(self, sums: list[tuple[Array, Array]]) -> float:
        """Sum over sum."""
        found = sum(float(loss) for loss, _ in sums) / sum(int(count) for _, count in sums)
        if not math.isfinite(found):
            raise NonFinite("FIT-NAN", "fit", f"the loss is {found}", "finite")
        return found

    def count(self, batches: list[dict[str, np.ndarray]]) -> int:
        """Targets: labels that count, but for each row's first, which nothing predicts."""
        return sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)


def minimized(
    loss: Loss,
    batches: list[dict[str, np.ndarray]],
    first: np.ndarray,
    free: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, int]:
    """(the weights of the least loss that was met, how many losses were computed).

    The unit is chosen so that the first step, which is one along the gradient, is FIRST_STEP: a
    shorter one could gain so little that it would be the last.
    """
    from scipy.optimize import minimize

    seen: dict[bytes, tuple[float, np.ndarray, np.ndarray]] = {}

    def at(weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        key = weights.tobytes()
        if key not in seen:
            seen[key] = *loss.with_slope(weights, batches), weights
            if progress:
                progress(min(len(seen), MOST_LOSSES), MOST_LOSSES)
        return seen[key]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        found, gradient, _ = at(unit * flat.reshape(first.shape))
        return found, unit * gradient.reshape(-1)

    unit = 1.0
    length = np.linalg.norm(at(first)[1])
    unit = math.sqrt(FIRST_STEP * math.sqrt(first.size) / length) if length else 1.0
    minimize(
        value,
        first.reshape(-1) / unit,
        jac=True,
        method="L-BFGS-B",
        bounds=None if free else [(0, None)] * first.size,
        options={
            "ftol": SMALLEST_GAIN,
            "gtol": SMALLEST_SLOPE / first.shape[1] * unit,
            "maxfun": MOST_LOSSES,
            "maxls": MOST_TRIALS,
        },
    )
    return min(seen.values(), key=lambda found: found[0])[2], len(seen)

"""How much a quantization lost, per weight and in all."""

import dataclasses
import io
import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qlora_jax.quantization.tensor import QuantizedTensor

FIGURES = ("max_error", "rms_error", "relative_error", "snr_db", "bits_per_parameter")


@dataclasses.dataclass(frozen=True)
class WeightError:
    """What one weight lost: e = dequantized - w, over all of its numbers.

    Attributes:
      name: as the checkpoint has it, `model.layers.3.self_attn.q_proj.weight`.
      parameters: numbers in it.
      nbytes: of codes and scales.
      max_error: max |e|, in the weight's own units.
      squared_error: sum of e^2.
      squared_weight: sum of w^2.
    """

    name: str
    parameters: int
    nbytes: int
    max_error: float
    squared_error: float
    squared_weight: float

    @property
    def rms_error(self) -> float:
        """sqrt(mean e^2), in the weight's own units."""
        return math.sqrt(self.squared_error / max(self.parameters, 1))

    @property
    def relative_error(self) -> float:
        """||e|| / ||w||, Frobenius norms; 0 where nothing was lost."""
        if self.squared_error == 0:
            return 0.0
        return (
            math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else math.inf
        )

    @property
    def snr_db(self) -> float:
        """Signal to noise, 20 log10(||w|| / ||e||) in dB; infinite where nothing was lost."""
        return -20 * math.log10(self.relative_error) if self.relative_error else math.inf

    @property
    def bits_per_parameter(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def to_json(self) -> dict[str, Any]:
        """The name, sizes and figures; a figure that is not finite is None."""
        figures = {name: getattr(self, name) for name in FIGURES}
        figures = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        return {"name": self.name, "parameters": self.parameters, "bytes": self.nbytes, **figures}


def measure(
    name: str,
    dense: Float[Array | np.ndarray, "..."],
    stored: QuantizedTensor | Float[Array | np.ndarray, "..."],
) -> WeightError:
    """What `stored` lost of `dense`, both (*lead, out, in); one weight in memory at a time.

    `stored` is 4-bit, or dense in another dtype. Errors are those of its float32 values. Sums are
    float32 along a row and float64 over the rows, so that a large matrix loses no digits.
    """
    packed = isinstance(stored, QuantizedTensor)
    shape = stored.lead + stored.shape if packed else stored.shape
    if tuple(dense.shape) != tuple(shape):
        raise ValueError(f"{name}: dense is {dense.shape}, stored {shape}")
    largest, error, weight = jax.device_get(row_sums(dense, stored))
    return WeightError(
        name=name,
        parameters=dense.size,
        nbytes=stored.nbytes,
        max_error=float(largest),
        squared_error=float(error.sum(dtype=np.float64)),
        squared_weight=float(weight.sum(dtype=np.float64)),
    )


@jax.jit
def row_sums(dense, stored):
    """The largest |e|, and e^2 and w^2 summed along each row."""
    w = jnp.asarray(dense).astype(jnp.float32)
    packed = isinstance(stored, QuantizedTensor)
    e = (stored.dequantize(jnp.float32) if packed else stored.astype(jnp.float32)) - w
    return jnp.abs(e).max(initial=0), (e * e).sum(axis=-1), (w * w).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Report:
    """The errors of all weights of a model, in the order in which they were measured.

    report = Report(tuple(measure(name, w, quantize(w)) for name, w in weights))
    print(report.short())
    report.plot("quantization.png")

    Attributes:
      weights: each with what is lost; where an adapter makes up for some of it, what is lost then.
      alone: where there is such an adapter, what plain 4 bits would lose, in the same order.
    """

    weights: Sequence[WeightError]
    alone: Sequence[WeightError] = ()

    @property
    def total(self) -> WeightError:
        """All weights as one: the largest error, sums over every number."""
        return in_all(self.weights)

    @property
    def plain(self) -> WeightError:
        """What plain 4 bits would lose in all."""
        return in_all(self.alone or self.weights)

    def worst(self, count: int) -> list[WeightError]:
        """The `count` weights with the largest relative error, worst first."""
        return sorted(self.weights, key=lambda w: w.relative_error, reverse=True)[:count]

    def table(self, worst: int | None = None) -> Table:
        """A rich table: every weight, or the `worst` ones, and the total in the last row."""
        shown = self.weights if worst is None else self.worst(worst)
        title = None if worst is None else f"The {len(shown)} weights that lost most, and all"
        table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
        table.add_column("weight", overflow="fold", min_width=30)
        headings = ("parameters", "bits", "max error", "RMS error", "relative", "SNR (dB)")
        for heading in headings + (("4 bits alone",) if self.alone else ()):
            table.add_column(heading, justify="right", no_wrap=True)
        alone = {weight.name: (percent(weight),) for weight in self.alone}
        for weight in shown:
            table.add_row(*cells(weight), *alone.get(weight.name, ()))
        table.add_section()
        plain = (percent(self.plain),) if self.alone else ()
        table.add_row(*cells(self.total), *plain, style="bold")
        return table

    def short(self, worst: int = 3) -> str:
        """The table of the `worst` weights and the total, as plain text of 100 columns."""
        text = io.StringIO()
        Console(file=text, width=100).print(self.table(worst))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")

    def to_json(self) -> dict[str, Any]:
        """`{"total": {...}, "weights": [{...}, ...]}`, see `WeightError.to_json`; and `alone`."""
        found = {"total": self.total.to_json(), "weights": [w.to_json() for w in self.weights]}
        if self.alone:
            each = [weight.to_json() for weight in self.alone]
            found["alone"] = {"total": self.plain.to_json(), "weights": each}
        return found

    def plot(self, path: str | PathLike) -> None:
        """Draws relative error by layer and projection, and the largest errors, to a PNG file."""
        from qlora_jax.quantization.plot import plot

        plot(self, path)


def in_all(weights: Sequence[WeightError]) -> WeightError:
    """Weights as one: the largest error, sums over every number."""
    return WeightError(
        name=f"all {len(weights)} weights",
        parameters=sum(w.parameters for w in weights),
        nbytes=sum(w.nbytes for w in weights),
        max_error=max((w.max_error for w in weights), default=0.0),
        squared_error=sum(w.squared_error for w in weights),
        squared_weight=sum(w.squared_weight for w in weights),
    )


def percent(weight: WeightError) -> str:
    """The relative error as people read it."""
    return f"{weight.relative_error:.2%}"


def cells(weight: WeightError) -> tuple[str, ...]:
    """A row of the table."""
    return (
        weight.name.removeprefix("model.").removesuffix(".weight"),
        f"{weight.parameters:,}",
        f"{weight.bits_per_parameter:.3f}",
        f"{weight.max_error:.3g}",
        f"{weight.rms_error:.3g}",
        percent(weight),
        f"{weight.snr_db:.2f}",
    )

"""The error report as a picture: where in a model a quantization lost how much."""

import re
from os import PathLike

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora_jax.quantization.report import Report

OUTSIDE = "none"  # the column of weights that belong to no layer, such as the head
TICKS = 16  # layers named on the axis at most


def plot(report: Report, path: str | PathLike) -> None:
    """Draws a PNG of two panels, layers from left to right.

    Above, the relative error of each weight as a heat map, a row a projection; below, the largest
    absolute error, a line a projection.
    """
    rows, columns = axes_of(report)
    relative, largest = np.full((2, len(rows), len(columns)), np.nan)
    for weight in report.weights:
        projection, layer = place(weight.name)
        at = rows.index(projection), columns.index(layer)
        relative[at], largest[at] = 100 * weight.relative_error, weight.max_error

    figure = Figure(figsize=(10, 2.6 + 2.6 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    total = report.total
    figure.suptitle(
        f"Quantization error: {total.relative_error:.2%} of the weights' norm, "
        f"{total.snr_db:.1f} dB, at {total.bits_per_parameter:.2f} bits a weight",
        fontweight="bold",
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.28 * len(rows) + 0.6, 2.6])

    image = above.imshow(relative, aspect="auto", cmap="viridis", interpolation="nearest")
    beside = above.inset_axes([1.015, 0, 0.02, 1])
    figure.colorbar(image, cax=beside, label="relative error (%)")
    above.set_title("Relative error of each weight (Frobenius norms)", loc="left", fontsize=10)
    above.set_yticks(range(len(rows)), rows)

    for projection, errors in zip(rows, largest, strict=True):
        below.plot(errors, marker="o", markersize=3, linewidth=1, label=projection)
    below.set_title("Largest error of a single number", loc="left", fontsize=10)
    below.set_ylabel("absolute error (weight units)")
    below.set_ylim(bottom=0)
    below.grid(alpha=0.3)
    below.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    every = -(-len(columns) // TICKS)
    below.set_xticks(range(0, len(columns), every), columns[::every])
    below.set_xlabel("layer")
    figure.savefig(path, format="png", dpi=130)


def axes_of(report: Report) -> tuple[list[str], list[int | str]]:
    """Projections in the order in which they come, and layers in rising order, OUTSIDE last."""
    places = [place(weight.name) for weight in report.weights]
    rows = list(dict.fromkeys(projection for projection, _ in places))
    layers = {layer for _, layer in places}
    outside = [OUTSIDE] if OUTSIDE in layers else []
    return rows, sorted(layers - {OUTSIDE}) + outside


def place(name: str) -> tuple[str, int | str]:
    """(projection, layer): (mlp.up_proj, 3) of `model.layers.3.mlp.up_proj.weight`."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return (found[2], int(found[1])) if found else (name.removesuffix(".weight"), OUTSIDE)

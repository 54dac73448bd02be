"""What a merge cost, and where its result comes from: as lines to read and as JSON to keep.

qlora_jax.json       in the merged folder from the first: base, adapter, weights, method
merge_report.json    written last, when the written model was opened again and compared
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.checkpoints.names import split
from qlora_jax.checkpoints.peft import TENSORS
from qlora_jax.models import Decoder
from qlora_jax.quantization.report import Report
from qlora_jax.workflows.adapter_folder import base_facts
from qlora_jax.workflows.answers import Answers
from qlora_jax.workflows.texts import Text

REPORT = "merge_report.json"
MERGED = "merged"  # the key in qlora_jax.json


@dataclasses.dataclass(frozen=True)
class Residual:
    """What 4 bits lost, as an adapter beside the merged model, and what the two answer together.

    Attributes:
      path: its folder.
      nbytes: of its tensors.
      largest: largest absolute difference of a logit from base + adapter.
      perplexity: of the merged model with it; None for random ids.
    """

    path: str
    nbytes: int
    largest: float
    perplexity: float | None

    @staticmethod
    def of(folder: Path, found: Answers, expected: Answers, text: Text) -> "Residual":
        """The adapter that was written, by the answers of the merged model with it."""
        said = found.perplexity if text.words else None
        return Residual(
            str(folder), (folder / TENSORS).stat().st_size, furthest(found, expected), said
        )


@dataclasses.dataclass(frozen=True)
class MergeCheck:
    """How far the merged model is from base + adapter, both computed in float32.

    Attributes:
      largest: largest absolute difference of a logit.
      mean: mean absolute difference.
      same_choice: share of positions at which both rank the same token first.
      tolerance: what `largest` was allowed to be.
      text: what both were asked.
      targets: tokens of it that were predicted.
      perplexity: of base + adapter; None for random ids.
      merged_perplexity: of the merged model.
      growth_allowed: by which part of it the perplexity was allowed to grow.
      weights: what was lost of each W + scale B A, by weight.
      from_training: largest difference from the 4-bit base that was trained on, with its adapter,
        after merging into the original weights; None otherwise.
      residual: an adapter that makes up for some of the loss; it counts for nothing above.
    """

    largest: float
    mean: float
    same_choice: float
    tolerance: float
    text: str
    targets: int
    perplexity: float | None
    merged_perplexity: float | None
    growth_allowed: float
    weights: Report
    from_training: float | None = None
    residual: Residual | None = None

    @property
    def growth(self) -> float:
        """By which part of it the perplexity grew; 0 where it was not measured."""
        return self.merged_perplexity / self.perplexity - 1 if self.perplexity else 0.0

    @property
    def passed(self) -> bool:
        """Whether both differences are within their tolerances; NaN is not."""
        return self.largest <= self.tolerance and self.growth <= self.growth_allowed

    @property
    def layers(self) -> dict[int, float]:
        """The relative error of each layer's merged weights, Frobenius norms."""
        groups: dict[int, list] = {}
        for weight in self.weights.weights:
            groups.setdefault(split(weight.name)[1], []).append(weight)
        return {i: Report(tuple(own)).total.relative_error for i, own in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it; a figure that is not finite is None."""
        figures = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        figures |= {"growth": self.growth, "passed": self.passed}
        for name, value in figures.items():
            if isinstance(value, float) and not np.isfinite(value):
                figures[name] = None
        figures["residual"] = self.residual and dataclasses.asdict(self.residual)
        layers = {str(layer): error for layer, error in self.layers.items()}
        return {**figures, "layers": layers, "weights": self.weights.to_json()}

    def lines(self) -> Iterator[str]:
        """What a user reads."""
        yield (
            f"checked    logits differ from base + adapter by {self.largest:.3g} at most, "
            f"{self.mean:.2g} on average (allowed {self.tolerance:g})"
        )
        yield f"           both rank the same token first at {self.same_choice:.1%} of positions"
        if self.from_training is not None:
            yield (
                f"           from the 4-bit base + adapter that were trained they differ by "
                f"{self.from_training:.3g}"
            )
        if self.perplexity is not None:
            yield (
                f"perplexity {self.perplexity:.4f} of base + adapter, "
                f"{self.merged_perplexity:.4f} merged ({self.growth:+.2%}, allowed "
                f"{self.growth_allowed:+.0%}): {self.text}, {self.targets:,} tokens"
            )
        if self.layers:
            worst = max(self.layers, key=self.layers.get)
            yield (
                f"weights    {self.weights.total.relative_error:.2%} off W + scale B A in all, "
                f"layer {worst} most: {self.layers[worst]:.2%}"
            )
        if self.residual is not None:
            own = self.residual
            said = "" if own.perplexity is None else f", perplexity {own.perplexity:.4f}"
            yield (
                f"residual   {own.path}: {own.nbytes / 1e6:.2f} MB beside it; with it logits "
                f"differ by {own.largest:.3g}{said}"
            )


def compared(
    found: Answers, expected: Answers, trained: Answers | None, text: Text, **told: Any
) -> MergeCheck:
    """The merged model's answers against those that it should give."""
    rows = list(zip(found.logits, expected.logits, strict=True))
    return MergeCheck(
        largest=furthest(found, expected),
        mean=float(np.mean([np.abs(own - other).mean() for own, other in rows])),
        same_choice=float(np.mean([own.argmax(-1) == other.argmax(-1) for own, other in rows])),
        text=text.name,
        targets=expected.targets,
        perplexity=expected.perplexity if text.words else None,
        merged_perplexity=found.perplexity if text.words else None,
        from_training=None if trained is None else furthest(found, trained),
        **told,
    )


def furthest(found: Answers, expected: Answers) -> float:
    """The largest difference of a logit; NaN when there is one."""
    rows = zip(found.logits, expected.logits, strict=True)
    return float(np.max([np.abs(a - b).max() for a, b in rows]))


def provenance(model: Decoder, adapter: Adapter, **how: Any) -> dict[str, Any]:
    """What qlora_jax.json says: of base and adapter their hashes, and how they were merged."""
    told = {key: value for key, value in how.items() if value is not None}
    return {MERGED: {**told, **base_facts(model), "adapter": adapter_digest(adapter)}}


def adapter_digest(adapter: Adapter) -> str:
    """SHA-256, in hex, of all that an adapter computes with: arrays, ranks and scales."""
    spec = adapter.spec
    digest = hashlib.sha256()
    for name in spec.targets:
        digest.update(f"{name} {spec.ranks(name)} {spec.scales(name).tolist()}".encode())
    for path, leaf in jax.tree.leaves_with_path(adapter.params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

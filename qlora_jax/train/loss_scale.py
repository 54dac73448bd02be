"""Dynamic loss scaling: float16 gradients kept between its smallest and its largest number."""

import dataclasses

FIRST = 2.0**15
GROWTH_INTERVAL = 2000  # steps without an overflow after which the scale doubles


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The factor on the loss; halved at an overflow, doubled after 2000 steps without one.

    Bfloat16 and float32 have float32's range and need none: their scale stays 1.

    Source: Micikevicius and others 2017, arXiv 1710.03740, section 3.2; the constants of PyTorch's
    GradScaler, but for a first scale that suits sums over targets rather than means.
    """

    value: float = 1.0
    good_steps: int = 0
    dynamic: bool = False

    @staticmethod
    def for_dtype(dtype: str) -> "LossScale":
        """The scale that a run in this compute dtype begins with."""
        return LossScale(FIRST, 0, True) if dtype == "float16" else LossScale()

    def after(self, finite: bool) -> "LossScale":
        """The scale of the next step."""
        if not self.dynamic:
            return self
        if not finite:
            return dataclasses.replace(self, value=max(1.0, self.value / 2), good_steps=0)
        if self.good_steps + 1 == GROWTH_INTERVAL:
            return dataclasses.replace(self, value=self.value * 2, good_steps=0)
        return dataclasses.replace(self, good_steps=self.good_steps + 1)

    def can_fall(self) -> bool:
        """Whether an overflow may be the scale's own fault, and a smaller one worth trying."""
        return self.dynamic and self.value > 1.0

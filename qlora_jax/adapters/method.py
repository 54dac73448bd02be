"""Which way adapters are combined, and its options: checked, and refused without effect."""

import dataclasses
import math

from qlora_jax.adapters.mixtures import MIXTURES, SIGNS
from qlora_jax.adapters.spec import check_rank
from qlora_jax.errors import InputError, listed, nearest

METHODS = ("cat", "svd", *MIXTURES)
DENSITY = 0.5  # where nobody says
# The methods in which an option has an effect.
USED_BY = {
    "svd_rank": ["svd"],
    "energy": ["svd"],
    "density": [name for name, how in MIXTURES.items() if how.prune],
    "sign": [name for name, how in MIXTURES.items() if how.elect],
    "seed": [name for name in MIXTURES if name.startswith("dare")],
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How adapters are combined; every value is valid.

    Attributes:
      name: one of METHODS.
      svd_rank: for svd, the rank of a matrix at most.
      energy: for svd, the share of the squared singular values that is kept at least.
      density: for the methods that leave entries out, the share that is kept.
      sign: for ties and dare_ties, what elects an entry's sign: total or frequency.
      seed: for dare_linear and dare_ties, which entries are kept.

    Raises:
      InputError: COMPOSE-METHOD, COMPOSE-OPTION, LORA-RANK.
    """

    name: str = "cat"
    svd_rank: int | None = None
    energy: float | None = None
    density: float | None = None
    sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            near = nearest(str(self.name), METHODS)
            found, expected = f"unknown {self.name!r}", f"one of {listed(METHODS)}"
            raise InputError("COMPOSE-METHOD", "method", found, expected, " or ".join(near))
        for field in dataclasses.fields(self):
            if field.name in USED_BY and getattr(self, field.name) != field.default:
                self.check_used(field.name)
        if self.svd_rank is not None:
            check_rank(self.svd_rank, "svd_rank")
            if self.energy is not None:
                found = "given beside svd_rank, and each says what the rank is"
                raise InputError("COMPOSE-OPTION", "energy", found, "one of the two")
        for option in ("energy", "density"):
            check_share(option, getattr(self, option))
        if self.sign not in SIGNS:
            found, expected = f"{self.sign!r}", f"one of {listed(SIGNS)}"
            raise InputError("COMPOSE-OPTION", "sign", found, expected)
        if type(self.seed) is not int or self.seed < 0:
            found, expected = f"{self.seed!r}", "a whole number, 0 or more"
            raise InputError("COMPOSE-OPTION", "seed", found, expected)

    def check_used(self, option: str) -> None:
        """Refuses an option that was given and has no effect."""
        if self.name not in USED_BY[option]:
            found = f"has no effect with method {self.name}"
            expected = f"method {' or '.join(USED_BY[option])}"
            raise InputError("COMPOSE-OPTION", option, found, expected)

    @property
    def kept(self) -> float:
        """The share of entries that is kept."""
        return DENSITY if self.density is None else float(self.density)

    @property
    def options(self) -> dict[str, int | float | str]:
        """What has an effect, with the value that is used."""
        used = (option for option, methods in USED_BY.items() if self.name in methods)
        found = {option: getattr(self, option) for option in used}
        if "density" in found:
            found["density"] = self.kept
        return {option: value for option, value in found.items() if value is not None}


def check_share(option: str, value: object) -> None:
    """Refuses what is given and not over 0 and at most 1."""
    if value is None:
        return
    if type(value) not in (int, float) or not 0 < value <= 1 or not math.isfinite(value):
        raise InputError("COMPOSE-OPTION", option, f"{value!r}", "over 0, at most 1")

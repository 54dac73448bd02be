"""Two tiers: `make test` shows every promise once, `make test-all` also each further case of it.

@pytest.mark.parametrize(("family", "remat"), tiered(product(FAMILIES, POLICIES), quick=[...]))
"""

from collections.abc import Iterable
from typing import Any

import pytest


def tiered(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """`values` for pytest's parametrize, marked slow unless they are among `quick`.

    A value that is a tuple stands for several arguments. A set has no order that two workers share.
    """
    assert not isinstance(values, set), "a set has another order in each worker"
    values, quick = list(values), list(quick)
    assert quick, "no case would be in the quick tier"
    assert all(value in values for value in quick), f"{quick} are not all among {values}"
    return [value if value in quick else slow(value) for value in values]


def slow(value: Any) -> Any:
    """One parameter of the slow tier."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)

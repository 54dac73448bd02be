"""A NaN or Inf is found wherever it is, and only then."""

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.checkpoints import finite
from qlora_jax.checkpoints.finite import EXPONENTS, check_finite, first_not_finite
from qlora_jax.errors import InputError

LARGEST = {name: ml_dtypes.finfo(name).max for name in EXPONENTS}


@pytest.mark.parametrize("name", EXPONENTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 11])
def test_names_the_first(monkeypatch, name, value, place):
    monkeypatch.setattr(finite, "PIECE", 5)
    array = np.full((3, 4), LARGEST[name], name)
    assert first_not_finite(array) is None
    assert first_not_finite(-array) is None
    array.reshape(-1)[place:] = value
    assert first_not_finite(array) == place
    with pytest.raises(InputError) as error:
        check_finite(array, "file", "w")
    index = (place // 4, place % 4)
    assert f"file: w: is not finite: {value} at index {index}" in str(error.value)
    assert error.value.code == "W-FINITE"


def test_an_empty_array_is_finite():
    assert first_not_finite(np.zeros((0, 3), np.float32)) is None

"""R27: 4-bit checkpoints whose state is missing, extra, of another shape, dtype or block size."""

import pytest

from qlora_jax.errors import InputError
from tests.checkpoints.bad_quant_states import BAD, edited
from tests.checkpoints.test_bnb4bit import load

RULE = "R27"


@pytest.mark.parametrize("case", BAD)
def test_no_key_has_a_default(case, tmp_path):
    """Refused by the case's own code; the messages are looked at beside the format's tests."""
    edit, code, _ = BAD[case]
    folder = edited(tmp_path, edit)
    with pytest.raises(InputError) as error:
        load(folder)
    assert error.value.code == code


def test_there_are_enough():
    assert len(BAD) >= 20

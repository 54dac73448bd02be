"""The first backend that takes the input answers, refusals are kept, nothing falls back unasked."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backends import Choice, Unsupported, dispatch, explain


def picky(x, *, scale):
    raise Unsupported(f"needs 128 columns, not {x.shape[-1]}")


def plain(x, *, scale):
    if scale < 0:
        raise ValueError(f"scale is {scale}")
    return x * scale


def never(x, *, scale):
    raise AssertionError("a later backend was asked though an earlier one answered")


X = jnp.ones((2, 8))
BACKENDS = (("picky", picky), ("plain", plain), ("never", never))


def test_the_first_that_takes_the_input_answers():
    assert dispatch(BACKENDS, X, scale=3)[0, 0] == 3


def test_a_named_backend_is_the_only_one_asked():
    assert dispatch(BACKENDS, X, scale=3, backend="plain")[0, 0] == 3
    with pytest.raises(Unsupported, match="picky: needs 128 columns, not 8"):
        dispatch(BACKENDS, X, scale=3, backend="picky")


def test_when_all_refuse_every_reason_is_told():
    with pytest.raises(Unsupported) as error:
        dispatch((("picky", picky), ("fussy", picky)), X, scale=3)
    assert str(error.value) == "picky: needs 128 columns, not 8; fussy: needs 128 columns, not 8"


def test_a_wrong_call_raises_at_once():
    with pytest.raises(ValueError, match="scale is -1"):
        dispatch(BACKENDS, X, scale=-1)
    with pytest.raises(ValueError, match="scale is -1"):
        explain(BACKENDS, X, scale=-1)


def test_an_unknown_name_lists_the_backends():
    for ask in (dispatch, explain):
        with pytest.raises(ValueError, match="'gpu'; the backends are picky, plain, never"):
            ask(BACKENDS, X, scale=3, backend="gpu")


@pytest.mark.parametrize("x", [X, jax.ShapeDtypeStruct((2, 8), "float32")])
def test_explain_tells_the_choice_and_why(x):
    choice = explain(BACKENDS, x, scale=3)
    assert choice == Choice("plain", (("picky", "needs 128 columns, not 8"),))
    assert str(choice) == "plain (not picky: needs 128 columns, not 8)"
    assert str(explain(BACKENDS, x, scale=3, backend="plain")) == "plain"


def test_explain_when_all_refuse():
    choice = explain(BACKENDS[:1], X, scale=3)
    assert choice.backend is None
    assert str(choice) == "none (not picky: needs 128 columns, not 8)"


def test_dispatch_inside_jit():
    assert jax.jit(lambda x: dispatch(BACKENDS, x, scale=3))(X)[0, 0] == 3

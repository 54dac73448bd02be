"""Checks the shapes and dtypes in signatures while the tests run: beartype, with one exception.

pyproject.toml names `checked` for pytest's --jaxtyping-packages; conftest.py imports it.
"""

import functools
from collections.abc import Callable

from beartype import BeartypeConf, beartype

CONFIG = BeartypeConf(is_pep484_tower=True)  # an int is a float, as for every type checker


def checked(function: Callable) -> Callable:
    """`function`, its annotations checked; not those of a dataclass's fields.

    jax.tree.unflatten builds pytrees with placeholders, and with batched or traced leaves, in the
    fields: whoever unpacks one in a function with a signature checks its leaves there.

    The check is built at the first call: most tests call few of the functions that they import.
    """
    if function.__name__ == "__init__":
        return function
    check = functools.cache(lambda: beartype(function, conf=CONFIG))
    return functools.wraps(function)(lambda *args, **kwargs: check()(*args, **kwargs))

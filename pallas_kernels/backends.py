"""Which implementation runs: each is asked in turn, and every refusal is kept.

An op lists its backends in its api.py, the best first and the reference last:

    BACKENDS = (("hopper", hopper.run), ("cpu", cpu.run), ("reference", reference.run))

A backend is asked by being called. It answers with the result, or raises `Unsupported` with the
reason why this input is not for it, before it computes anything. Arrays are positional, what is
static is by keyword. ValueError means that the caller is wrong, and is raised at once.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

Backends = tuple[tuple[str, Callable[..., Any]], ...]


class Unsupported(NotImplementedError):
    """A backend is not for this input: ask the next one, and keep the reason."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that answers, and why those before it do not.

    Attributes:
      backend: its name; None when all refused.
      refusals: (name, reason) of each that was asked before.
    """

    backend: str | None
    refusals: tuple[tuple[str, str], ...]

    @property
    def reasons(self) -> list[str]:
        """`not hopper, ampere: the default device is a cpu`: those of one reason together."""
        names: dict[str, list[str]] = {}
        for name, reason in self.refusals:
            names.setdefault(reason, []).append(name)
        return [f"not {', '.join(some)}: {reason}" for reason, some in names.items()]

    def __str__(self) -> str:
        """`cpu (not hopper, ampere: the default device is a cpu)`."""
        reasons = "; ".join(self.reasons)
        return f"{self.backend or 'none'} ({reasons})" if reasons else f"{self.backend}"


def dispatch(backends: Backends, *arrays: Any, backend: str | None = None, **static: Any) -> Any:
    """The result of the first of `backends` that takes the input.

    Args:
      backends: (name, function) pairs, the best first.
      *arrays: passed on, as are the keywords in `static`.
      backend: the only one to ask; it never falls back.

    Raises:
      Unsupported: the named backend refused, or all did; the text holds every reason.
      ValueError: there is no backend of that name, or the backend says that the call is wrong.
    """
    return ask(backends, backend, lambda run: run(*arrays, **static))[1]


def explain(backends: Backends, *arrays: Any, backend: str | None = None, **static: Any) -> Choice:
    """What `dispatch` would choose for the same arguments, and every refusal; computes nothing.

    `arrays` may be `jax.ShapeDtypeStruct`s. Print the answer once, at the start of a run.
    """

    def trace(run):
        return jax.eval_shape(functools.partial(run, **static), *arrays)

    try:
        return ask(backends, backend, trace)[0]
    except AllRefused as refused:
        return refused.choice


watched: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "watched", default=None
)


@contextlib.contextmanager
def watch() -> Iterator[list[Choice]]:
    """Within it the list gets each Choice as its backend has answered: of nested ones, inner first.

    What is jitted and was traced before is not asked again, and adds nothing.
    """
    choices: list[Choice] = []
    token = watched.set(choices)
    try:
        yield choices
    finally:
        watched.reset(token)


def noted(choice: Choice) -> Choice:
    """The choice, after it was added to the watched ones."""
    if (choices := watched.get()) is not None:
        choices.append(choice)
    return choice


class AllRefused(Unsupported):
    """No backend was left to ask."""

    def __init__(self, choice: Choice):
        self.choice = choice
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in choice.refusals))


def ask(
    backends: Backends, backend: str | None, call: Callable[[Callable[..., Any]], Any]
) -> tuple[Choice, Any]:
    """(who answered, the answer) of the first backend, or of the named one alone."""
    names = [name for name, _ in backends]
    if backend is not None and backend not in names:
        raise ValueError(f"backend is {backend!r}; the backends are {', '.join(names)}")
    refusals = []
    for name, run in backends:
        if backend in (None, name):
            try:
                answer = call(run)
            except Unsupported as reason:
                refusals.append((name, str(reason)))
            else:
                return noted(Choice(name, tuple(refusals))), answer
    raise AllRefused(noted(Choice(None, tuple(refusals))))

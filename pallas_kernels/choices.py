"""Which backends an op chooses for given arguments, and why not those before them."""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backends import AllRefused, Choice, watch

# op: (where it lives, its name there, whether it has a gradient, for its first argument).
OPS = {
    "nf4_matmul": ("pallas_kernels.nf4_matmul.api", "nf4_matmul", True),
    "lora_matmul": ("pallas_kernels.lora_matmul.api", "lora_matmul", True),
    "cross_entropy": ("pallas_kernels.cross_entropy.api", "cross_entropy", True),
    "dequantize": ("pallas_kernels.dequantize.api", "dequantize_4bit", False),
    "quantize": ("pallas_kernels.quantize.api", "quantize_4bit", False),
}
ONLY = Choice("jnp", ())  # of an op that is plain jnp and asks nobody


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The choice of each direction of an op; print it.

    Attributes:
      op: its name.
      forward: who computes it.
      gradient: who computes its gradient; None for an op without one.
    """

    op: str
    forward: Choice
    gradient: Choice | None

    def __str__(self) -> str:
        """A line a direction, and below it one a reason of refusals."""
        directions = {self.op: self.forward, f"{self.op}, gradient": self.gradient}
        lines = []
        for name, choice in directions.items():
            if choice is not None:
                lines.append(f"{name}: {choice.backend or 'no backend'}")
                lines += [f"  {reason}" for reason in choice.reasons]
        return "\n".join(lines)


def explain(op: str, *arguments: Any, **static: Any) -> Explanation:
    """Which backend computes `op` for these arguments, and the refusal of each before it.

        print(pallas_kernels.explain("nf4_matmul", x, codes, scales, shape=(out, width)))

    The arguments are those of the op itself. Nothing is computed, and arrays may be
    `jax.ShapeDtypeStruct`s: what a shape would choose can be asked before there is any data.

    Args:
      op: nf4_matmul, lora_matmul, cross_entropy, dequantize or quantize.
      *arguments: arrays, as the op takes them.
      **static: the op's keywords, `backend` among them.

    Raises:
      ValueError: there is no such op, or the op itself refuses the call as wrong.
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}; the ops are {', '.join(OPS)}")
    module, name, differentiable = OPS[op]
    function = getattr(importlib.import_module(module), name)
    function = getattr(function, "__wrapped__", function)  # jit answers from what it traced before
    run = functools.partial(function, **static)
    forward = choice(run, arguments)
    if not differentiable or forward.backend is None:
        return Explanation(op, forward, None)
    return Explanation(op, forward, choice(functools.partial(gradient, run), arguments))


def choice(run: Any, arguments: tuple[Any, ...]) -> Choice:
    """The last that was made while tracing: an op asks once, and those that it calls ask before."""
    with watch() as choices:
        try:
            jax.eval_shape(run, *arguments)
        except AllRefused as refused:
            return refused.choice
    return choices[-1] if choices else ONLY


def gradient(run: Any, x: Any, *others: Any) -> Any:
    """The gradient of `run` with respect to x."""
    y, pull_back = jax.vjp(lambda x: run(x, *others), x)
    return pull_back(jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), y))

"""Several adapters of one base, held together, so that rows of a batch can use different ones.

    stack = stack_adapters({"law": A, "sql": B})
    model(input_ids, adapter=stack, adapter_index=[1, -1, 0])       sql, none, law

What a pass costs depends on its rows, not on how many adapters are held: each row's thin matrices
are gathered, once a pass, or once for all tokens of a text (`rows`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.adapters.adapter import Adapter, check_finite
from qlora_jax.adapters.prepared import Parts, Prepared, join, padded
from qlora_jax.errors import InputError, listed, nearest

NONE = -1  # the index of a row without an adapter
Which = Sequence[int | str | None] | Int[Array | np.ndarray, " B"] | int | str | None


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """N adapters of one base; a pytree, under jit too.

    Ranks are padded with zeros to the largest, and a target that an adapter does not have has scale
    0 in it. All that differs between adapters is in arrays: an adapter that is exchanged for
    another of these shapes compiles nothing anew.

    Attributes:
      params: by target, A (L, N, r, in) and Bt (L, N, r, out), which is B transposed; float32.
      scales: by target, (L, N).
      names: of the adapters, in order; a program does not know them, and gives back none.
    """

    params: dict[str, dict[str, Float[Array, "L N r n"]]]
    scales: dict[str, Float[Array, "L N"]]
    names: tuple[str, ...] = ()

    def tree_flatten_with_keys(self):
        """Arrays alone: another name is not another program."""
        key = jax.tree_util.GetAttrKey
        return ((key("params"), self.params), (key("scales"), self.scales)), None

    @classmethod
    def tree_unflatten(cls, _, children) -> "AdapterStack":
        """The stack without names."""
        return cls(*children)

    @property
    def count(self) -> int:
        """N."""
        return next(iter(self.scales.values())).shape[1]

    @property
    def depth(self) -> int:
        """L."""
        return next(iter(self.scales.values())).shape[0]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears that any of them adapts."""
        return {n: (p["Bt"].shape[3], p["A"].shape[3]) for n, p in self.params.items()}

    def index(self, which: Which, rows: int) -> Int[Array, " B"]:
        """For each of `rows` rows the number of its adapter, int32; -1 for none.

        Args:
          which: a number, a name or None for all rows, or one of these for each.

        Raises:
          InputError: STACK-INDEX, a number or a name that is not there, or not one a row.
        """
        if isinstance(which, jax.core.Tracer):
            return which
        if which is None or isinstance(which, int | str):
            which = [which] * rows
        numbers = [self.number(one) for one in np.asarray(which, object).reshape(-1)]
        if len(numbers) != rows:
            found = f"{len(numbers)} of them for {rows} rows"
            raise InputError("STACK-INDEX", "adapter_index", found, "one a row")
        return jnp.asarray(numbers, jnp.int32)

    def number(self, one: int | str | None) -> int:
        """The number of an adapter that is told by number or name."""
        if one is None:
            return NONE
        if isinstance(one, str):
            if one not in self.names:
                near = nearest(one, self.names)
                hint = f"did you mean {near[0]}" if near else ""
                self.refuse(f"{one!r} is no adapter of this stack", hint)
            return self.names.index(one)
        number = int(one)
        if number != one or not NONE <= number < self.count:
            self.refuse(f"{one}")
        return number

    def refuse(self, found: str, hint: str = "") -> NoReturn:
        """The error for an adapter that is not there."""
        named = f": {listed(self.names)}" if self.names else ""
        expected = f"0 to {self.count - 1}{named}, or -1 for none"
        raise InputError("STACK-INDEX", "adapter_index", found, expected, hint)

    def rows(self, index: Int[Array, " B"], parts: Parts, dtype: str) -> Prepared:
        """Each row's own matrices, for a pass without an `adapter_index`.

        An index that is out of range, in a program where no error can be raised, gives NaN.

        Args:
          index: from 0; -1 is none.
          parts: what the model's linears were joined from.
          dtype: of the activations.
        """
        held = jnp.clip(index, 0, self.count - 1)
        known = (index >= NONE) & (index < self.count)
        on = jnp.where(known, index >= 0, jnp.nan)
        pairs = {}
        for name, own in self.params.items():
            scales = self.scales[name][:, held] * on
            pairs[name] = own["A"][:, held], own["Bt"][:, held] * scales[..., None, None]
        return join(pairs, {}, {}, parts, dtype)


def stack_adapters(adapters: Mapping[str, Adapter]) -> AdapterStack:
    """Adapters of one base in one tree, in the order in which they are given.

        stack = stack_adapters({"law": A, "sql": B})

    Ranks, alphas, targets and rsLoRA may differ.

    Raises:
      InputError: STACK-EMPTY; STACK-KIND, DoRA or modules_to_save; STACK-BASE, adapters of
        different models; LORA-FINITE, NaN or infinity.
    """
    if not adapters:
        raise InputError("STACK-EMPTY", "stack_adapters", "no adapters", "at least one")
    first = next(iter(adapters))
    shapes: dict[str, tuple[int, int]] = {}
    for name, adapter in adapters.items():
        check_kind(name, adapter)
        depth, expected = adapter.spec.num_layers, adapters[first].spec.num_layers
        if depth != expected:
            found = f"{depth} layers, and {first} has {expected}"
            raise InputError("STACK-BASE", name, found, "adapters of one base")
        for target, shape in adapter.shapes.items():
            if shapes.setdefault(target, shape) != shape:
                found = f"{target} is {shape}, and {shapes[target]} in another adapter"
                raise InputError("STACK-BASE", name, found, "adapters of one base")
        check_finite(adapter)
    params, scales = {}, {}
    for target, (out, width) in shapes.items():
        own = [a for a in adapters.values() if target in a.params]
        rank = max(a.params[target]["A"].shape[1] for a in own)
        layers = own[0].spec.num_layers
        none = {"A": jnp.zeros((layers, rank, width)), "B": jnp.zeros((layers, out, rank))}
        pairs = [adapter.params.get(target, none) for adapter in adapters.values()]
        params[target] = {
            "A": jnp.stack([padded(jnp.asarray(p["A"]), rank) for p in pairs], axis=1),
            "Bt": jnp.stack([padded(p["B"].swapaxes(1, 2), rank) for p in pairs], axis=1),
        }
        scales[target] = jnp.stack(
            [
                jnp.asarray(a.spec.scales(target)) if target in a.params else jnp.zeros(layers)
                for a in adapters.values()
            ],
            axis=1,
        )
    return AdapterStack(params, scales, tuple(adapters))


def check_kind(name: str, adapter: Adapter) -> None:
    """Refuses what is more than A and B, by name."""
    spec, hint = adapter.spec, "it alone for all rows, or merge it into a base of its own"
    if spec.use_dora:
        raise InputError(
            "STACK-KIND", name, "is DoRA, which stretches the base's rows", "LoRA", hint
        )
    if spec.modules_to_save:
        found = f"holds {listed(spec.modules_to_save)} in full (modules_to_save)"
        raise InputError("STACK-KIND", name, found, "LoRA of linears alone", hint)

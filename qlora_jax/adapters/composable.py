"""What can be combined: finite adapters of one model, of kinds that have a sum, and weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.adapters.adapter import Adapter, check_finite
from qlora_jax.adapters.parts import Part
from qlora_jax.adapters.spec import MAX_RANK
from qlora_jax.errors import InputError, listed

Weights = Mapping[str, float | Sequence[float] | np.ndarray]


def check_adapters(adapters: Mapping[str, Adapter]) -> None:
    """Refuses none at all, NaN and infinity, and adapters of different models.

    Raises:
      InputError: COMPOSE-NONE, LORA-FINITE, COMPOSE-MODEL, with the adapter's name.
    """
    if not adapters:
        raise InputError("COMPOSE-NONE", "adapters", "none", "one at least")
    for name, adapter in adapters.items():
        try:
            check_finite(adapter)
        except InputError as error:
            raise InputError(error.code, f"{name}: {error.where}", error.found) from None
    (first, own), *others = adapters.items()
    for name, other in others:
        if other.spec.num_layers != own.spec.num_layers:
            found = f"is for {other.spec.num_layers} layers, and {first} for {own.spec.num_layers}"
            raise InputError("COMPOSE-MODEL", name, found, "adapters of one model")
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, adapter in adapters.items():
        for module, shape in adapter.shapes.items():
            giver, known = seen.setdefault(module, (name, tuple(shape)))
            if tuple(shape) != known:
                found = f"{module} is {tuple(shape)}, and {known} in {giver}"
                raise InputError("COMPOSE-MODEL", name, found, "adapters of one model")


def check_kinds(adapters: Mapping[str, Adapter]) -> None:
    """Refuses DoRA and modules trained in full: without the base they have no weighted sum.

    Raises:
      InputError: COMPOSE-KIND.
    """
    for name, adapter in adapters.items():
        if adapter.spec.use_dora:
            found = "is a DoRA adapter: its lengths of rows have no weighted sum"
            hint = "merge it into the base, or leave it out"
            raise InputError("COMPOSE-KIND", name, found, "LoRA adapters", hint)
        if saved := adapter.spec.modules_to_save:
            found = f"has {listed(saved)} trained in full (modules_to_save), which has no delta"
            hint = "merge it into the base, or leave it out"
            raise InputError("COMPOSE-KIND", name, found, "LoRA adapters", hint)


def weights_by_layer(adapters: Mapping[str, Adapter], weights: Weights) -> dict[str, np.ndarray]:
    """Each adapter's weight in each layer, (L,), in the adapters' order.

    Raises:
      InputError: COMPOSE-WEIGHT: a name without a weight, a weight without an adapter, one that is
        no finite number.
    """
    if without := [name for name in adapters if name not in weights]:
        found = f"none for {listed(without)}"
        raise InputError("COMPOSE-WEIGHT", "weights", found, "one for each adapter")
    if unknown := [name for name in weights if name not in adapters]:
        found = f"one for {listed(unknown)}, of which there is no adapter"
        raise InputError("COMPOSE-WEIGHT", "weights", found, f"one of {listed(adapters)}")
    return {name: one_weight(weights[name], adapter, name) for name, adapter in adapters.items()}


def one_weight(weight: Any, adapter: Adapter, name: str) -> np.ndarray:
    """A number for every layer, or one that all have."""
    layers = adapter.spec.num_layers
    given = [weight] if np.ndim(weight) == 0 else list(weight)
    for value in given:
        known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not known or not abs(value) <= np.finfo(np.float32).max:
            found = f"the weight is {value!r}" if not known else f"the weight is {value}"
            raise InputError("COMPOSE-WEIGHT", name, found, "a finite number")
    if len(given) not in (1, layers):
        found = f"{len(given)} weights"
        raise InputError("COMPOSE-WEIGHT", name, found, f"one, or one for each of {layers} layers")
    return np.broadcast_to(np.array(given, np.float64), (layers,))


def check_equal_ranks(parts: Sequence[Part], method: str, where: str) -> None:
    """Refuses A and B that have no sum.

    Raises:
      InputError: COMPOSE-RANK, which names the methods for unequal ranks.
    """
    if len({len(part.A) for part in parts}) > 1:
        found = f"ranks differ: {', '.join(f'{part.name} {len(part.A)}' for part in parts)}"
        hint = "method cat, which adds them up, or svd"
        raise InputError("COMPOSE-RANK", where, found, f"equal ones for {method}", hint)


def check_sum_of_ranks(rank: int, where: str) -> None:
    """Refuses a rank that no adapter may have.

    Raises:
      InputError: COMPOSE-RANK.
    """
    if rank > MAX_RANK:
        found = f"the ranks add up to {rank}"
        raise InputError("COMPOSE-RANK", where, found, f"at most {MAX_RANK}", "method svd")


def unchanged(adapters: Mapping[str, Adapter], weights: Mapping[str, np.ndarray]) -> Adapter | None:
    """The adapter itself, where it is alone, of a kind that has no sum, and its weight is 1."""
    (name, adapter), *others = adapters.items()
    whole = adapter.spec.use_dora or adapter.spec.modules_to_save
    if others or not whole or not (weights[name] == 1).all():
        return None
    return dataclasses.replace(adapter)

"""Which tensors a PEFT adapter's file must hold, by name and shape; any other file is refused.

PEFT warns when keys are missing, and the model then answers as if it were not trained.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qlora_jax.adapters.adapter import Shapes, param_shapes
from qlora_jax.adapters.spec import SAVED, LoraSpec, module_path
from qlora_jax.checkpoints.safetensors_header import Entry
from qlora_jax.errors import InputError, listed

PREFIX = "base_model.model."  # PEFT wraps the model twice, and its keys say so
DTYPES = ("float32", "bfloat16", "float16")
SUFFIXES = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
AXES = {"A": "(r, in)", "B": "(out, r)", "m": "(out,)", "weight": "(vocabulary, hidden)"}


class Place(NamedTuple):
    """Where a tensor of the file lies in an adapter: `params[module][kind][index]`."""

    module: str
    kind: str  # A, B, m, or weight of a saved module
    index: tuple[int | slice, ...]


def places(spec: LoraSpec) -> Iterator[tuple[str, Place]]:
    """Every tensor's PEFT name and place, in the spec's order; padding is not in the file.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (self_attn.q_proj, A, [0, :r])
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector           ... m, [0]
    base_model.model.lm_head.weight                                           (lm_head, weight, [])
    """
    kinds = ("A", "B", "m") if spec.use_dora else ("A", "B")
    for module in spec.targets:
        for layer, rank in enumerate(spec.ranks(module)):
            index = {"A": (layer, slice(rank)), "B": (layer, slice(None), slice(rank))}
            for kind in kinds if rank else ():
                name = f"{PREFIX}{module_path(layer, module)}.{SUFFIXES[kind]}"
                yield name, Place(module, kind, index.get(kind, (layer,)))
    for module in spec.modules_to_save:
        yield saved_name(module), Place(module, "weight", ())


def check_entries(entries: Mapping[str, Entry], spec: LoraSpec, shapes: Shapes, where: str) -> None:
    """Refuses a file whose names, shapes or types are not exactly what the config promises.

    Raises:
      InputError: PEFT-MISSING, PEFT-UNKNOWN, PEFT-SHAPE, PEFT-DTYPE.
    """
    whole = param_shapes(spec, shapes)
    expected = {
        name: (place.kind, cut(whole[place.module][place.kind], place.index))
        for name, place in places(spec)
    }
    if missing := sorted(expected.keys() - entries.keys()):
        raise InputError("PEFT-MISSING", where, f"missing tensors: {listed(missing)}")
    if unknown := sorted(entries.keys() - expected.keys()):
        extra = [name for name in SAVED if saved_name(name) in unknown]
        hint = f"modules_to_save: {extra} in adapter_config.json, if meant" if extra else ""
        found, meant = f"unknown tensors: {listed(unknown)}", "what adapter_config.json promises"
        raise InputError("PEFT-UNKNOWN", where, found, meant, hint)
    for name, (kind, shape) in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            other = name.replace(*("lora_A", "lora_B")[:: 1 if kind == "A" else -1])
            swapped = kind in "AB" and entry.shape == expected[other][1]
            hint = "a file in which A and B are not swapped" if swapped else ""
            found, meant = f"has the shape {entry.shape}", f"shape {shape}, {AXES[kind]}"
            raise InputError("PEFT-SHAPE", f"{where}: {name}", found, meant, hint)
        if entry.dtype.name not in DTYPES:
            meant = " or ".join(DTYPES)
            raise InputError("PEFT-DTYPE", f"{where}: {name}", f"is {entry.dtype.name}", meant)


def saved_name(module: str) -> str:
    """PEFT's name of the weight of lm_head or embed_tokens."""
    return f"{PREFIX}{SAVED[module]}.weight"


def cut(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of `array[index]` for an array of `shape`; none is made."""
    return np.broadcast_to(np.float32(0), shape)[index].shape

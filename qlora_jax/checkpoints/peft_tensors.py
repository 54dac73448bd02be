"""Which tensors a PEFT adapter's file must hold, by name and shape; any other file is refused.

PEFT warns when keys are missing, and the model then answers as if it were not trained.
"""

from collections.abc import Iterator, Mapping

from qlora_jax.adapters.spec import LoraSpec, module_path
from qlora_jax.checkpoints.safetensors_header import Entry
from qlora_jax.errors import InputError, listed

DTYPES = ("float32", "bfloat16", "float16")

Shapes = Mapping[str, tuple[int, int]]  # (out, in) of each linear of one layer


def tensor_name(name: str, layer: int, matrix: str) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return f"base_model.model.{module_path(layer, name)}.lora_{matrix}.weight"


def pairs(spec: LoraSpec, shapes: Shapes) -> Iterator[dict[str, tuple[int, int]]]:
    """The names and shapes of A and B, for each target and layer that has them."""
    for name in spec.targets:
        out, width = shapes[name]
        for layer, rank in enumerate(spec.ranks(name)):
            if rank:
                yield {
                    tensor_name(name, layer, "A"): (rank, width),
                    tensor_name(name, layer, "B"): (out, rank),
                }


def check_entries(entries: Mapping[str, Entry], spec: LoraSpec, shapes: Shapes, where: str) -> None:
    """Refuses a file whose names, shapes or types are not exactly what the config promises.

    Raises:
      InputError: PEFT-MISSING, PEFT-UNKNOWN, PEFT-SHAPE, PEFT-DTYPE.
    """
    expected = {name: shape for pair in pairs(spec, shapes) for name, shape in pair.items()}
    if missing := sorted(expected.keys() - entries.keys()):
        raise InputError("PEFT-MISSING", where, f"missing tensors: {listed(missing)}")
    if unknown := sorted(entries.keys() - expected.keys()):
        raise InputError("PEFT-UNKNOWN", where, f"unknown tensors: {listed(unknown)}")
    for pair in pairs(spec, shapes):
        for name, shape in pair.items():
            check_entry(entries[name], name, shape, where, swapped=list(pair.values())[::-1])


def check_entry(entry: Entry, name: str, shape: tuple[int, int], where: str, swapped: list) -> None:
    """Refuses one tensor of another shape or type."""
    if entry.shape != shape:
        kind = "(out, r)" if name.endswith("lora_B.weight") else "(r, in)"
        hint = "a file in which A and B are not swapped" if entry.shape in swapped else ""
        found = f"has the shape {entry.shape}"
        raise InputError("PEFT-SHAPE", f"{where}: {name}", found, f"shape {shape}, {kind}", hint)
    if entry.dtype.name not in DTYPES:
        meant = " or ".join(DTYPES)
        raise InputError("PEFT-DTYPE", f"{where}: {name}", f"is {entry.dtype.name}", meant)

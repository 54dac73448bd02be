"""What is in a folder that `save_orbax` wrote, from its manifest: no array is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.checkpoints.manifest import read_manifest, understood
from qlora_jax.checkpoints.orbax_io import ARRAYS
from qlora_jax.checkpoints.safetensors_header import nbytes
from qlora_jax.checkpoints.trees import unpack
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.description import Description, Weight

PARAMS = "params/"  # where an adapter's arrays are


def describe_orbax(folder: Path) -> Description:
    """The arrays of a checkpoint; an adapter's with its rank, a 4-bit matrix as one weight.

    Raises:
      InputError, StorageError: ORB-..., the manifest is missing, damaged, or of a later version.
    """
    with understood(folder):
        return described(folder, read_manifest(folder))


def described(folder: Path, manifest: dict[str, Any]) -> Description:
    """What a manifest that is believed says."""
    tree = manifest["tree"]
    facts, targets = dict(manifest["metadata"]), []
    is_adapter = tree.get("class") == Adapter.__name__
    if is_adapter:
        spec = unpack(tree["static"]["spec"])
        facts |= {"r": spec.r, "lora_alpha": spec.lora_alpha, "use_rslora": spec.use_rslora}
        facts |= {"use_dora": spec.use_dora}
        if spec.modules_to_save:
            facts["modules_to_save"] = list(spec.modules_to_save)
        targets = list(spec.targets)
    return Description(
        str(folder),
        kind="Orbax adapter" if is_adapter else "Orbax checkpoint",
        facts=facts,
        weights=list(weights_of(tree, "", manifest["leaves"])),
        targets=targets,
        files=[ARRAYS],
    )


def weights_of(node: dict[str, Any], path: str, leaves: dict[str, Any]) -> Iterator[Weight]:
    """One weight for each array or 4-bit matrix below a node of the description."""
    if "leaf" in node:
        entry = leaves[node["leaf"]]
        if entry["kind"] != "value":
            layers, shape = layered(path, entry["shape"])
            yield Weight(path.removeprefix(PARAMS), layers, shape, entry["dtype"], size(entry))
    elif node.get("class") == QuantizedTensor.__name__:
        static = {key: unpack(value) for key, value in node["static"].items()}
        parts = {name: entry for name, entry in leaves.items() if name.startswith(f"{path}/")}
        layers, _ = layered(path, parts[f"{path}/codes"]["shape"])
        scales = "8-bit" if f"{path}/absmax/codes" in parts else "float32"
        stored = f"{static['kind']}, block {static['block_size']}, {scales} scales"
        yield Weight(path, layers, static["shape"], stored, sum(map(size, parts.values())))
    else:
        for key, child in next((value for value in node.values() if type(value) is list), []):
            yield from weights_of(child, f"{path}/{key}" if path else str(key), leaves)


def layered(path: str, shape: list[int]) -> tuple[int, tuple[int, ...]]:
    """(layers, shape of one): the leading axis of what a model has once a layer."""
    module = path.removeprefix(PARAMS)
    if path.startswith(LAYERS) or (path.startswith(PARAMS) and "." in module):
        return shape[0], tuple(shape[1:])
    return 1, tuple(shape)


def size(entry: dict[str, Any]) -> int:
    """Bytes of an array."""
    return nbytes((jnp.dtype(entry["dtype"]), entry["shape"]))

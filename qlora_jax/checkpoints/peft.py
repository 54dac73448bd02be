"""PEFT adapter folders, in and out: what is written is read again, what is read is checked whole.

adapter_config.json          PEFT's fields and no others, since PEFT refuses or ignores them
adapter_model.safetensors    base_model.model.<module path>.lora_A.weight (r, in), lora_B (out, r),
                             with DoRA lora_magnitude_vector (out,); <module path>.weight (V, D)
qlora_jax.json               ours: what the adapter was trained on
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from qlora_jax.adapters.adapter import Adapter, Shapes, check_finite, param_shapes
from qlora_jax.adapters.init import Adaptable
from qlora_jax.checkpoints import finite
from qlora_jax.checkpoints.atomic import new_folder, write_file
from qlora_jax.checkpoints.files import WeightFile, inside
from qlora_jax.checkpoints.peft_config import config_from_spec, spec_from_config
from qlora_jax.checkpoints.peft_tensors import check_entries, places
from qlora_jax.checkpoints.shards import SafetensorsFile
from qlora_jax.checkpoints.strict_json import read_json
from qlora_jax.checkpoints.torch_file import TorchFile
from qlora_jax.errors import InputError, StorageError, listed

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OLD_TENSORS = "adapter_model.bin"  # of PEFT before 0.8; read when it is alone
EXTRA = "qlora_jax.json"


def load_adapter(path: str | Path, model: Adaptable) -> Adapter:
    """The adapter in a PEFT folder, float32, for `model`.

    Args:
      path: a folder with adapter_config.json and adapter_model.safetensors, or else .bin.
      model: what it is for; only the shapes of its modules are read.

    Raises:
      InputError: PEFT-..., LORA-..., JSON-..., ST-..., PT-..., PK-..., W-FINITE: a file is missing
        or damaged, or asks for what is not computed here; a tensor is missing, unknown, of another
        shape than config and model say, or not finite.
    """
    return read_adapter(path, model.module_shapes(), model.config.num_hidden_layers)


def read_adapter(path: str | Path, shapes: Shapes, num_layers: int) -> Adapter:
    """`load_adapter` for a model that is known by its shapes alone."""
    folder = Path(path)
    config = read_json(present(folder, CONFIG))
    spec = spec_from_config(config, shapes, num_layers, str(folder / CONFIG))
    with contextlib.closing(open_tensors(folder)) as file:
        check_entries(file.entries, spec, shapes, file.where)
        params = {
            module: {kind: np.zeros(shape, np.float32) for kind, shape in arrays.items()}
            for module, arrays in param_shapes(spec, shapes).items()
        }
        for name, place in places(spec):
            params[place.module][place.kind][place.index] = finite_tensor(file, name)
    return Adapter(jax.tree.map(jnp.asarray, params), spec)


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    *,
    base_model_name: str | None = None,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> None:
    """Writes `adapter` as a folder that PEFT loads, then reads it again and compares.

    Args:
      path: a new folder, of which nothing is left when writing fails; or an existing one, such as
        a run's, which becomes the adapter: its files come one by one, the tensors last.
      adapter: what is written, in the type of its arrays.
      base_model_name: PEFT's base_model_name_or_path.
      tokenizer: saved beside the adapter: has transformers' `save_pretrained`.
      extra: content of qlora_jax.json, such as the base's fingerprint and the stop tokens.
      extra_files: further files by name.
      replace: files of an existing folder may be replaced; otherwise one of them is an error.

    Raises:
      InputError: OUT-EXISTS, or LORA-FINITE for an adapter with NaN or infinity.
      StorageError: OUT-FULL, OUT-WRITE, or OUT-VERIFY when it does not read back as it was.
    """
    check_finite(adapter)
    files = {
        **tokenizer_files(tokenizer),
        **(extra_files or {}),
        CONFIG: as_json(config_from_spec(adapter.spec, base_model_name)),
        EXTRA: as_json(extra or {}),
        TENSORS: save(dict(tensors_of(adapter)), metadata={"format": "pt"}),
    }
    folder = Path(path)
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            write_files(temporary, files)
            verify(temporary, adapter)
        return
    there = [name for name in files if os.path.lexists(folder / name)]
    if there and not replace:
        found = f"holds {listed(there)} already"
        raise InputError("OUT-EXISTS", folder, found, "a new folder", "another name")
    write_files(folder, files)
    verify(folder, adapter)


def read_extra(path: str | Path) -> dict[str, Any]:
    """What an adapter's folder says beyond PEFT's fields: qlora_jax.json, `{}` if there is none."""
    file = inside(path, EXTRA)
    return read_json(file) if file.exists() else {}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Each file whole or not at all, in the order given; `files` is empty afterwards."""
    for name in list(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, files.pop(name))


def verify(folder: Path, adapter: Adapter) -> None:
    """Reads a folder just written; every tensor, rank and scale must be as in `adapter`."""
    try:
        again = read_adapter(folder, adapter.shapes, adapter.spec.num_layers)
    except InputError as error:
        raise StorageError("OUT-VERIFY", folder, f"cannot be read back: {error}") from error
    written, found = dict(tensors_of(adapter)), dict(tensors_of(again))
    same = all(np.array_equal(written[name].astype(np.float32), found[name]) for name in written)
    if again.spec != adapter.spec or not same:
        raise StorageError("OUT-VERIFY", folder, "does not read back as it was written")


def tensors_of(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Each array by PEFT's name, padding cut off."""
    for name, place in places(adapter.spec):
        whole = np.asarray(adapter.params[place.module][place.kind])
        yield name, np.ascontiguousarray(whole[place.index])


def open_tensors(folder: Path) -> WeightFile:
    """The opened file of an adapter's tensors, to be closed."""
    if not os.path.lexists(folder / TENSORS) and os.path.lexists(folder / OLD_TENSORS):
        return TorchFile(present(folder, OLD_TENSORS), str(folder / OLD_TENSORS))
    return SafetensorsFile(present(folder, TENSORS), str(folder / TENSORS))


def finite_tensor(file: WeightFile, name: str) -> np.ndarray:
    """One tensor of the file, refused when it holds NaN or infinity."""
    entry = file.entries[name]
    array = np.empty(entry.shape, entry.dtype)
    file.read_bytes(entry, array)
    finite.check_finite(array, file.where, name)
    return array


def present(folder: Path, name: str) -> Path:
    """The real path of a file that must be in an adapter's folder."""
    if not folder.is_dir():
        hint = f"the folder that holds {CONFIG}"
        found = "missing adapter: there is no such folder"
        raise InputError("PEFT-FOLDER", folder, found, "a PEFT adapter", hint)
    file = inside(folder, name)
    if not file.exists():
        raise InputError("PEFT-FOLDER", folder, f"missing {name}", "a PEFT adapter")
    return file


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What `tokenizer.save_pretrained` writes, by file name; nothing without a tokenizer."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def as_json(content: Mapping[str, Any]) -> bytes:
    """Indented, with sorted keys, as PEFT writes its config."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

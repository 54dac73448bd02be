"""Small model folders and damaged safetensors files for the tests of checkpoints."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {"model_type": "llama"}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file of this header (an object, or its very bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One tensor's fields."""
    as_list = [list(v) if isinstance(v, tuple) else v for v in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def one_tensor(name: str = "a", values: Any = (1.0, 2.0)) -> bytes:
    """A good file of one float32 tensor."""
    data = np.asarray(values, np.float32)
    header = {name: entry("F32", data.shape, (0, data.nbytes))}
    return safetensors_bytes(header, data.tobytes())


def model_files(folder: Path, files: dict[str, bytes], config: Any = CONFIG) -> Path:
    """Writes config.json and `files` into a new folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def index(weight_map: Any, **more: Any) -> bytes:
    """An index.json."""
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map, **more}).encode()

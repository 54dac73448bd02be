"""Golden arrays made by the peers: each one is an input that is read, or is compared; none is left.

A file's own keys drive the test, so new data is a new test, and data that nothing looks at fails:

    with GoldenFile(golden_folder("models") / "llama" / "io.npz", inputs={"input_ids"}) as golden:
        for key in golden.outputs():
            golden.compare(key, compute(key, golden.input("input_ids")), atol=LOGITS_ATOL)
"""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

OWN = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("QLORA_GOLDEN", OWN))
# Folders that need no other one: read from here where the golden data of elsewhere lacks them.
SELF_CONTAINED = {"init"}

Chosen = Collection[str] | Callable[[str], bool]


def golden_folder(name: str) -> Path:
    """The folder of golden data `name` ("nf4", "models/llama"); it must exist."""
    folder = GOLDEN / name
    if name in SELF_CONTAINED and not folder.is_dir():
        folder = OWN / name
    assert folder.is_dir(), f"no golden data at {folder} (QLORA_GOLDEN names another folder?)"
    return folder


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one file by key: .npz, .safetensors, .npy (its stem), .json (dotted keys)."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npy":
        return {path.stem: np.load(path)}
    assert path.suffix == ".json", f"{path}: no golden format"
    return {".".join(keys): np.asarray(leaf) for keys, leaf in leaves(json.loads(path.read_text()))}


def leaves(tree, keys=()):
    """(keys, leaf) of every leaf of nested dicts."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*keys, key))
    else:
        yield keys, tree


class GoldenFile:
    """One file of golden arrays; leaving its `with` block fails when a key was not looked at.

    Args:
      path: .npz, .safetensors, .npy or .json.
      inputs: keys that the test reads and does not compare: names, or a predicate on a key.
      part: the keys that this test answers for (default all); the others are not seen at all.
        The tests of a file must cover all of its keys between them.
    """

    def __init__(self, path: Path, inputs: Chosen = (), part: Chosen | None = None):
        arrays = read_arrays(Path(path))
        self.path, self.seen = path, set()
        self.arrays = {key: arrays[key] for key in arrays if part is None or chosen(part, key)}
        self.inputs = {key for key in self.arrays if chosen(inputs, key)}
        if not callable(inputs):
            assert set(inputs) <= set(self.arrays), f"{path}: no {set(inputs) - set(self.arrays)}"
        assert self.outputs(), f"{path}: nothing to compare"

    def keys(self) -> list[str]:
        """Every key, in the file's order."""
        return list(self.arrays)

    def outputs(self) -> list[str]:
        """Every key that must be compared, in the file's order."""
        return [key for key in self.arrays if key not in self.inputs]

    def input(self, key: str) -> np.ndarray:
        """The array of an input; a key that is not declared an input is refused."""
        assert key in self.inputs, f"{self.path}: {key} is not declared an input"
        self.seen.add(key)
        return self.arrays[key]

    def compare(self, key: str, value, *, atol=0.0, rtol=0.0, where=None) -> None:
        """Fails unless |value - golden| <= atol + rtol |golden|, and shapes are equal.

        `where` is a mask over the leading axes: (2, 24) selects rows of (2, 24, 256).
        """
        value, golden = self.pair(key, value)
        if where is not None:
            where = np.asarray(where, bool)
            assert where.any(), f"{key}: the mask selects nothing"
            value, golden = value[where], golden[where]
        value, golden = value.astype(np.float64), golden.astype(np.float64)
        np.testing.assert_allclose(
            value, golden, atol=atol, rtol=rtol, equal_nan=False, err_msg=f"{self.path.name}: {key}"
        )

    def compare_exact(self, key: str, value, *, where=None) -> None:
        """Fails unless shapes and every value are equal; `where` as in `compare`."""
        self.compare(key, value, where=where)

    def pair(self, key: str, value) -> tuple[np.ndarray, np.ndarray]:
        """(value, golden) as NumPy arrays of one shape; marks the key as compared."""
        assert key not in self.inputs, f"{self.path}: {key} is an input"
        value, golden = np.asarray(value), self.arrays[key]
        assert value.shape == golden.shape, f"{key}: shape {value.shape}, golden {golden.shape}"
        self.seen.add(key)
        return value, golden

    def finish(self) -> None:
        """Fails when a key was neither read as an input nor compared."""
        left = [key for key in self.arrays if key not in self.seen]
        assert not left, f"{self.path}: nothing looked at {left}"

    def __enter__(self) -> "GoldenFile":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.finish()


def chosen(which: Chosen, key: str) -> bool:
    """Whether a set of names or a predicate chooses `key`."""
    return which(key) if callable(which) else key in which


def spoil(path: Path, key: str) -> None:
    """Changes one value of one array of a file.

    The first value is the one that changes, by more than any tolerance: floats by 1 plus a tenth,
    integers in one bit.
    """
    arrays = read_arrays(path)
    arrays[key] = changed(arrays[key])
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".npy":
        np.save(path, arrays[key])
    else:
        path.write_text(json.dumps(nested(arrays)))


def changed(array: np.ndarray) -> np.ndarray:
    """A copy of `array` whose first value is another one."""
    array = array.copy()
    first = array.reshape(-1)[:1]  # a view, also of a scalar array
    first[...] = first * 1.1 + 1 if array.dtype.kind == "f" else first ^ 1
    return array


def nested(arrays: dict[str, np.ndarray]) -> dict:
    """`read_arrays` of a .json undone."""
    tree: dict = {}
    for name, array in arrays.items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array.item()
    return tree

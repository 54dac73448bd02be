"""A pytree to a folder and back through Orbax, verified to the bit: run state, adapter, parameters.

    state/
        arrays/          Orbax's own checkpoint, for every tool that reads one
        manifest.json    our description of the tree, and digests of every leaf and file

Orbax notices neither flipped bits nor another dtype than was asked for, so nothing is returned
before every digest agrees. This is the only file that imports it, when it is first needed.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.atomic import new_folder
from qlora_jax.checkpoints.manifest import (
    DAMAGED,
    array_digest,
    read_manifest,
    understood,
    verify_files,
    write_manifest,
)
from qlora_jax.checkpoints.trees import describe, difference, rebuild
from qlora_jax.errors import InputError, StorageError

ARRAYS = "arrays"
VALUES = (bool, int, float, str)  # leaves that the manifest itself holds


def save_orbax(path: str | Path, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write the pytree `tree` to the new folder `path`, whole or not at all, and verify it.

    Args:
      path: must not exist; nothing is ever overwritten.
      tree: of JAX or NumPy arrays of any number dtype, PRNG keys, and Python numbers and text.
        Adapters and quantized tensors are described in full; of other classes, only the leaves.
      metadata: a JSON object that is kept with it.

    Raises:
      InputError: OUT-EXISTS, ORB-NAME, ORB-LEAF (what a leaf cannot be), ORB-METADATA.
      StorageError: the disk is full or fails, or what was written is not what is read back.
    """
    description, leaves = describe(tree)
    entries, arrays = {}, {}
    for name, leaf in leaves.items():
        entries[name], array = taken_apart(name, leaf)
        if array is not None and array.size:  # Orbax refuses arrays without a value
            arrays[name] = array
    with new_folder(path) as folder:
        if arrays:
            write_arrays(folder / ARRAYS, arrays)
        content = {"tree": description, "leaves": entries, "metadata": metadata or {}}
        write_manifest(folder, content)
        verified_arrays(folder, read_manifest(folder))


def load_orbax(path: str | Path, like: Any = None) -> Any:
    """Read what `save_orbax` wrote: the same values, dtypes and shapes, bit for bit.

    Args:
      path: the folder.
      like: an example of the tree (arrays or `jax.ShapeDtypeStruct`): its classes are built, its
        arrays' shardings and memory kinds are used, and another structure, shape or dtype is an
        error. Without it arrays go to the default device, and of classes that this package does not
        know, an optimizer's state say, come dicts.

    Raises:
      InputError: ORB-MISSING, ORB-VERSION, or ORB-LIKE when it is not what `like` asks for.
      StorageError: ORB-MANIFEST, ORB-FILES, ORB-LEAF: something is missing or damaged; names it.
    """
    return load_with_metadata(path, like)[0]


def load_with_metadata(path: str | Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """`load_orbax`, and the metadata that was saved with the tree."""
    with understood(path):
        return load_described(Path(path), like)


def load_described(folder: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """`load_with_metadata`, of a manifest that is believed."""
    manifest = read_manifest(folder)
    wanted = describe(like)[1] if like is not None else {}
    if like is not None:
        refuse_other(manifest, like, str(folder))
    verify_files(folder, manifest)
    arrays = verified_arrays(folder, manifest)
    leaves = {
        name: put_together(name, entry, arrays.get(name), wanted.get(name))
        for name, entry in manifest["leaves"].items()
    }
    if like is None:
        return rebuild(manifest["tree"], leaves), manifest["metadata"]
    treedef = jax.tree.structure(like)
    return jax.tree.unflatten(treedef, [leaves[name] for name in wanted]), manifest["metadata"]


def taken_apart(name: str, leaf: Any) -> tuple[dict[str, Any], np.ndarray | None]:
    """(the manifest's entry of a leaf, its values if it is an array)."""
    if type(leaf) in VALUES:
        return {"kind": "value", "value": leaf}, None
    if not isinstance(leaf, jax.Array | np.ndarray):
        expected = "an array, a number or text"
        raise InputError("ORB-LEAF", name, f"is of type {type(leaf).__name__}", expected)
    entry = {"kind": "jax" if isinstance(leaf, jax.Array) else "numpy"}
    if is_key(leaf):
        entry = {"kind": "key", "implementation": str(jax.random.key_impl(leaf))}
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    if array.dtype.kind in "OSUMm" or array.dtype.names or not array.dtype.isnative:
        expected = "numbers in the machine's byte order"
        raise InputError("ORB-LEAF", name, f"has dtype {array.dtype.str}", expected)
    entry |= {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": array_digest(array)}
    return entry, array


def put_together(name: str, entry: dict[str, Any], array: np.ndarray | None, like: Any) -> Any:
    """`taken_apart` undone, placed where `like` is."""
    if entry["kind"] == "value":
        return entry["value"]
    if isinstance(like, np.ndarray) or (like is None and entry["kind"] == "numpy"):
        return array
    leaf = jax.device_put(array)
    if leaf.dtype != array.dtype:
        found = f"has dtype {array.dtype}, which JAX narrows here"
        raise InputError("ORB-LEAF", name, found, hint="JAX_ENABLE_X64=1, as when it was saved")
    if entry["kind"] == "key":
        leaf = jax.random.wrap_key_data(leaf, impl=entry["implementation"])
    sharding = getattr(like, "sharding", None)
    return leaf if sharding is None else jax.device_put(leaf, sharding)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def refuse_other(manifest: dict[str, Any], like: Any, where: str) -> None:
    """Refuses a saved tree whose structure, shapes or dtypes are not those of `like`."""
    description, wanted = describe(like)
    found = difference(manifest["tree"], description)
    for name, leaf in () if found else wanted.items():
        old, new = summary_of_entry(manifest["leaves"][name]), summary(leaf)
        if old != new:
            found = f"{name} is saved as {old}, asked for as {new}"
            break
    if found:
        raise InputError("ORB-LIKE", where, found, "the tree that was saved")


def summary(leaf: Any) -> str:
    """What must agree: `float32 (2, 3)`."""
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{'PRNG key' if is_key(leaf) else leaf.dtype.name} {tuple(leaf.shape)}"


def summary_of_entry(entry: dict[str, Any]) -> str:
    """`summary` of the leaf that an entry describes."""
    if entry["kind"] == "value":
        return type(entry["value"]).__name__
    shape = tuple(entry["shape"])
    return f"PRNG key {shape[:-1]}" if entry["kind"] == "key" else f"{entry['dtype']} {shape}"


def verified_arrays(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every array by its path, compared with its entry of the manifest."""
    entries = {name: e for name, e in manifest["leaves"].items() if e["kind"] != "value"}
    stored = [name for name, entry in entries.items() if 0 not in entry["shape"]]
    arrays = read_arrays(folder / ARRAYS, stored) if stored else {}
    for name, entry in entries.items():
        if name not in stored:
            arrays[name] = np.zeros(entry["shape"], entry["dtype"])
        array = arrays[name]
        found = [list(array.shape), array.dtype.name, array_digest(array)]
        if found != [entry["shape"], entry["dtype"], entry["sha256"]]:
            what = f"leaf {name} is damaged: its shape, dtype or digest differs"
            raise StorageError("ORB-LEAF", str(folder), what, hint=DAMAGED)
    return arrays


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Orbax's checkpoint of a flat dict."""
    with orbax_checkpointer() as (orbax, run, checkpointer):
        try:
            run(checkpointer.save, folder.absolute(), args=orbax.args.PyTreeSave(arrays))
        except ValueError as error:
            if code := re.search(r"os_error_code='(\d+)'", str(error)):  # a full disk, say
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise StorageError("ORB-WRITE", str(folder), f"Orbax cannot write: {error}") from error


def read_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays that `write_arrays` wrote, by name."""
    with orbax_checkpointer() as (orbax, run, checkpointer):
        as_numpy = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = orbax.args.PyTreeRestore(restore_args=as_numpy)
        try:
            found = run(checkpointer.restore, folder.absolute(), args=args)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"Orbax cannot read it: {error}"
            raise StorageError("ORB-READ", str(folder), what, hint=DAMAGED) from error
    return {name: np.asarray(found[name]) for name in names}


@contextlib.contextmanager
def orbax_checkpointer() -> Iterator[tuple[Any, Callable[..., Any], Any]]:
    """(orbax, a way to run a call, a checkpointer): silent, synchronous, and closed at the end.

    Calls run in a thread of their own: Orbax starts an event loop, and where one runs already, as
    in a notebook, it would patch asyncio for the whole process.
    """
    import orbax.checkpoint as orbax

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what goes wrong is raised, and said once
    try:
        with (
            ThreadPoolExecutor(1) as thread,
            orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer,
        ):
            yield (
                orbax,
                lambda call, *args, **kw: thread.submit(call, *args, **kw).result(),
                checkpointer,
            )
    finally:
        logger.setLevel(level)

import asyncio
import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints.manifest import write_manifest
from qlora_jax.checkpoints.orbax_io import load_orbax, load_with_metadata, save_orbax
from qlora_jax.errors import InputError, StorageError
from qlora_jax.optim.paged_adamw import paged_adamw
from qlora_jax.placement import memory_kind, to_device
from qlora_jax.quantization.tensor import QuantizedTensor, quantize
from tests.random_arrays import normal

DTYPES = ["float32", "float16", "bfloat16", "int32", "uint8", "int8", "uint32", "bool"]


def small_tree():
    """One leaf of every kind, in every kind of node."""
    rng = np.random.default_rng(0)
    return {
        "arrays": {
            name: jnp.asarray(rng.integers(0, 2, (3, 5)) * 1.5).astype(name) for name in DTYPES
        },
        "numpy": np.arange(6, dtype=np.int64).reshape(2, 3).T,  # not row-major
        "wide": np.array(1 / 3),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "scalar": jnp.float32(0.1),
        "values": [3, 2.5, True, "text", None],
        "pair": (np.ones(2, np.float32), {}),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "name/with.dots": jnp.arange(3),
    }


def assert_same(found, saved):
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if not hasattr(b, "dtype"):
            assert (type(a), a) == (type(b), b)
            continue
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small tree, saved once; tests work on copies."""
    folder = tmp_path_factory.mktemp("orbax") / "saved"
    save_orbax(folder, small_tree(), metadata={"step": 3, "loss": 1.25, "list": [1, "two"]})
    return folder


def test_restored_is_saved_bit_for_bit(saved):
    assert_same(load_orbax(saved), small_tree())
    tree, metadata = load_with_metadata(saved, like=small_tree())
    assert_same(tree, small_tree())
    assert metadata == {"step": 3, "loss": 1.25, "list": [1, "two"]}


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.int32, np.uint8, np.float16]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    )
)
def test_any_bits_survive_nan_payloads_too(tmp_path_factory, array):
    folder = tmp_path_factory.mktemp("orbax") / "saved"
    save_orbax(folder, [array])
    assert_same(load_orbax(folder), [array])


def test_an_adapter_comes_back_with_its_spec(tmp_path):
    shapes = {"self_attn.q_proj": (8, 4), "mlp.down_proj": (4, 16)}
    spec = make_spec(shapes, 3, r=2, alpha=4.0, rank_pattern={"layers.1.mlp.down_proj": 1})
    params = {
        name: {"A": jnp.ones((3, 2, n_in)), "B": jnp.full((3, n_out, 2), 0.1)}
        for name, (n_out, n_in) in shapes.items()
    }
    adapter = Adapter(params, spec)
    save_orbax(tmp_path / "adapter", adapter)
    found = load_orbax(tmp_path / "adapter")
    assert isinstance(found, Adapter)
    assert found.spec == spec
    assert found.spec.rank_pattern == spec.rank_pattern
    assert_same(found.params, params)
    other = Adapter(params, make_spec(shapes, 3, r=2, alpha=8.0))
    with pytest.raises(InputError, match=r"spec is saved as LoraSpec.*asked for as LoraSpec"):
        load_orbax(tmp_path / "adapter", like=other)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_tensor_comes_back_whole(tmp_path, double_quant):
    weight = normal(0, 8, 128)
    tensor = quantize(weight, double_quant=double_quant)
    save_orbax(tmp_path / "merged", {"model.norm.weight": jnp.ones(4), "w": tensor})
    found = load_orbax(tmp_path / "merged")["w"]
    assert isinstance(found, QuantizedTensor)
    assert_same(found, tensor)
    np.testing.assert_array_equal(found.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("memory", ["host", "device"])
def test_a_run_s_state_comes_back_where_it_was(tmp_path, memory):
    optimizer = paged_adamw(optax.linear_schedule(1e-3, 0.0, 10), memory=memory)
    params = to_device({"q": {"A": np.ones((3, 2, 4)), "B": np.zeros((3, 5, 2))}})
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda leaf: leaf + 0.5, params)
    params, state = optimizer.apply(params, grads, state)
    save_orbax(tmp_path / "state", {"params": params, "optimizer": state})
    empty = {"params": params, "optimizer": optimizer.init(params)}
    found = load_orbax(tmp_path / "state", like=empty)
    assert_same(found, {"params": params, "optimizer": state})
    for a, b in zip(jax.tree.leaves(found["optimizer"]), jax.tree.leaves(state), strict=True):
        assert memory_kind(a) == memory_kind(b)
    again = optimizer.apply(found["params"], grads, found["optimizer"])
    assert_same(again, optimizer.apply(params, grads, state))


def changes(tree):
    """What may be asked for instead of the saved tree, and what the error says."""
    arrays = tree["arrays"]
    return {
        "shape": ({**tree, "scalar": jnp.zeros(2)}, r"scalar is saved as float32 \(\)"),
        "dtype": (
            {**tree, "arrays": {**arrays, "uint8": arrays["float32"]}},
            r"arrays/uint8 is saved as uint8 \(3, 5\), asked for as float32",
        ),
        "missing": ({**tree, "new": 1}, r"the tree has no new"),
        "more": ({k: v for k, v in tree.items() if k != "key"}, r"has key, which was not asked"),
        "node": (
            {**tree, "pair": list(tree["pair"])},
            r"pair is saved as tuple, asked for as list",
        ),
        "value": ({**tree, "values": [3.0, 2.5, True, "", None]}, r"values/0 is saved as int"),
        "key": ({**tree, "key": jnp.zeros(2, jnp.uint32)}, r"key is saved as PRNG key \(\)"),
    }


@pytest.mark.parametrize("name", changes(small_tree()))
def test_another_tree_than_was_saved_is_refused(saved, name):
    like, message = changes(small_tree())[name]
    with pytest.raises(InputError, match=message):
        load_orbax(saved, like=like)


def test_shapes_alone_are_example_enough(saved):
    tree = small_tree()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree
    )
    assert_same(load_orbax(saved, like=like), tree)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_flipped_bit_is_refused_with_the_name_of_the_file(saved, tmp_path):
    """The first, the last and 25 other places of every file; a bit each."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    assert len(files(folder)) > 5
    for path in files(folder):
        whole = path.read_bytes()
        places = {0, len(whole) - 1, *rng.integers(0, len(whole), 25).tolist()}
        for place in places:
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(spoiled)
            with pytest.raises(StorageError) as caught:
                load_orbax(folder)
            assert path.name in str(caught.value)
        path.write_bytes(whole)
    assert_same(load_orbax(folder), small_tree())


@pytest.mark.parametrize("kept", [0, 0.5, 1])
def test_a_truncated_file_is_refused(saved, tmp_path, kept):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    for path in files(folder):
        whole = path.read_bytes()
        path.write_bytes(whole[: min(int(len(whole) * kept), len(whole) - 1)])
        with pytest.raises(StorageError) as caught:
            load_orbax(folder)
        assert path.name in str(caught.value)
        path.write_bytes(whole)


def test_a_missing_file_is_named_and_so_is_a_new_one(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    for path in files(folder):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises((StorageError, InputError), match=path.name):
            load_orbax(folder)
        path.write_bytes(whole)
    (folder / "arrays" / "extra").write_text("")
    with pytest.raises(StorageError, match="arrays/extra is not in the manifest"):
        load_orbax(folder)
    shutil.rmtree(folder / "arrays")
    with pytest.raises(StorageError, match=r"is missing.*Try: another copy"):
        load_orbax(folder)


def test_a_link_out_of_the_folder_is_not_followed(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    for number, path in enumerate(files(folder)):
        path.rename(tmp_path / str(number))
        path.symlink_to(tmp_path / str(number))
        with pytest.raises(InputError, match="leads outside the folder"):
            load_orbax(folder)
        path.unlink()
        (tmp_path / str(number)).rename(path)


def test_swapped_files_are_refused(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    # Orbax keeps some files twice under random names; two that differ are swapped.
    by_content = {path.read_bytes(): path for path in files(folder) if path.parent.name == "d"}
    first, second = list(by_content.values())[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(StorageError, match=f"{first.name}|{second.name}"):
        load_orbax(folder)


def test_a_leaf_that_orbax_gives_back_otherwise_is_named(saved, tmp_path):
    """Files and manifest agree, and Orbax still returns other numbers than were saved."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["leaves"]["arrays/uint8"]["sha256"] = "0" * 64
    write_manifest(folder, {key: content[key] for key in ("tree", "leaves", "metadata")})
    with pytest.raises(StorageError, match="leaf arrays/uint8 is damaged"):
        load_orbax(folder)


def test_a_later_version_is_refused(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    write_manifest(folder, {"format_version": 2, "tree": {}, "leaves": {}, "metadata": {}})
    with pytest.raises(InputError, match=r"format version 2 \(expected 1\)"):
        load_orbax(folder)


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: missing: no such folder"):
        load_orbax(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no manifest.json \(expected a folder that save_orb"):
        load_orbax(tmp_path)


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tmp_path, saved):
    before = {path: path.read_bytes() for path in files(saved)}
    with pytest.raises(InputError, match="exists already"):
        save_orbax(saved, {"a": np.ones(2)})
    assert before == {path: path.read_bytes() for path in files(saved)}
    with pytest.raises(InputError, match=r"metadata: is not JSON"):
        save_orbax(tmp_path / "new", {"a": np.ones(2)}, metadata={"loss": float("nan")})
    with pytest.raises(InputError, match="JSON does not give it back"):
        save_orbax(tmp_path / "new", {"a": np.ones(2)}, metadata={1: 2})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.array(["text"]), "has dtype <U4"),
        (np.arange(3, dtype=">i4"), r"has dtype >i4 \(expected numbers in the machine"),
        (object(), r"bad: is of type object \(expected an array"),
    ],
)
def test_a_leaf_that_cannot_be_saved_is_named(tmp_path, leaf, message):
    with pytest.raises(InputError, match=message):
        save_orbax(tmp_path / "new", {"bad": leaf})


def test_two_leaves_of_one_path_are_refused(tmp_path):
    with pytest.raises(InputError, match="a/b: two leaves have this path"):
        save_orbax(tmp_path / "new", {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(0).standard_normal(200_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(StorageError, match=r"OUT-FULL.*File too large.*GB free"):
            save_orbax(tmp_path / "new", {"noise": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_orbax_reads_the_arrays_itself(saved):
    import orbax.checkpoint as orbax

    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(saved.absolute() / "arrays")
    np.testing.assert_array_equal(found["numpy"], small_tree()["numpy"])


def test_it_works_inside_a_running_event_loop_and_leaves_no_thread(saved):
    before = threading.active_count()
    level = logging.getLogger("absl").level

    async def notebook_cell():
        return load_orbax(saved)

    assert_same(asyncio.run(notebook_cell()), small_tree())
    assert threading.active_count() == before
    assert logging.getLogger("absl").level == level


def test_orbax_is_imported_only_when_it_is_needed():
    code = (
        "import sys, qlora_jax.checkpoints.orbax_io; assert 'orbax.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

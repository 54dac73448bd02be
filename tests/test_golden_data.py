"""The golden tests can fail: a spoiled array is seen, and a key that nothing looks at too."""

import numpy as np
import pytest

from tests.golden_data import GoldenFile, read_arrays, spoil

ARRAYS = {
    "floats.npz": {"x": np.zeros((2, 3), np.float32), "y": np.float64(1e6)},
    "codes.npz": {"codes": np.arange(4, dtype=np.uint8), "ids": np.arange(3, dtype=np.int64)},
    "adapter.safetensors": {"a.weight": np.ones((2, 2), np.float32)},
    "windows.npy": {"windows": np.arange(6, dtype=np.int32).reshape(2, 3)},
}
KEYS = [(file, key) for file, arrays in ARRAYS.items() for key in arrays]
KEYS += [("scores.json", "nf4.mean_nll"), ("scores.json", "nf4.targets")]


@pytest.fixture
def folder(tmp_path):
    from safetensors.numpy import save_file

    source = tmp_path / "source"
    source.mkdir()
    np.savez(source / "floats.npz", **ARRAYS["floats.npz"])
    np.savez(source / "codes.npz", **ARRAYS["codes.npz"])
    save_file(ARRAYS["adapter.safetensors"], source / "adapter.safetensors")
    np.save(source / "windows.npy", ARRAYS["windows.npy"]["windows"])
    (source / "scores.json").write_text('{"nf4": {"mean_nll": 3.2, "targets": 4080}}')
    return source


@pytest.mark.parametrize(("file", "key"), KEYS)
def test_a_spoiled_array_fails(folder, file, key):
    truth = read_arrays(folder / file)
    spoil(folder / file, key)
    with GoldenFile(folder / file) as golden:
        for name in golden.outputs():
            if name == key:
                with pytest.raises(AssertionError, match=key):
                    golden.compare(name, truth[name], atol=0.9)
            else:
                golden.compare_exact(name, truth[name])


def test_a_key_that_nothing_looks_at_fails(folder):
    path = folder / "codes.npz"
    with (
        pytest.raises(AssertionError, match="nothing looked at \\['ids'\\]"),
        GoldenFile(path, inputs={"ids"}) as golden,
    ):
        golden.compare_exact("codes", np.arange(4))


def test_an_output_cannot_be_read_as_an_input(folder):
    golden = GoldenFile(folder / "codes.npz", inputs={"ids"})
    with pytest.raises(AssertionError, match="not declared"):
        golden.input("codes")
    with pytest.raises(AssertionError, match="is an input"):
        golden.compare("ids", np.arange(3))


def test_shape_nan_and_mask(folder):
    golden = GoldenFile(folder / "floats.npz")
    with pytest.raises(AssertionError, match="shape"):
        golden.compare("x", np.zeros(6))
    with pytest.raises(AssertionError, match="nan"):
        golden.compare("x", np.full((2, 3), np.nan), atol=1.0)
    golden.compare("x", [[0, 0, 0], [9, 9, 9]], where=[True, False])
    with pytest.raises(AssertionError):
        golden.compare("x", [[0, 0, 0], [9, 9, 9]], where=[True, True])
    with pytest.raises(AssertionError, match="selects nothing"):
        golden.compare("x", np.zeros((2, 3)), where=[False, False])


def test_part_limits_what_must_be_looked_at(folder):
    with GoldenFile(folder / "floats.npz", part=lambda key: key == "y") as golden:
        assert golden.keys() == ["y"]
        golden.compare("y", 1e6 + 1, rtol=1e-5)
    with pytest.raises(AssertionError, match="nothing to compare"):
        GoldenFile(folder / "floats.npz", part={"z"})

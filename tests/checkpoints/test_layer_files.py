"""Layers read one at a time: what a stacked load holds, in memory that is used again."""

import gc

import jax
import numpy as np
import pytest

from qlora_jax.checkpoints.layer_files import LayerFiles
from qlora_jax.checkpoints.load import Loader, load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError
from qlora_jax.models import ModelConfig
from qlora_jax.models.layer_stream import SLOTS, LayerStream
from qlora_jax.weight_names import LAYERS
from tests.golden_data import golden_folder
from tests.reliability import clean


def opened(folder, layout: str = "bnb", dtype: str = "float32") -> tuple[LayerFiles, dict]:
    """The layers in their files, and the weights of all of them as a load has them."""
    source = Shards(folder)
    config = ModelConfig.from_dict(source.config)
    stacked = load_weights(source, config, dtype=dtype, layout=layout)
    return LayerFiles(Loader(source, config, dtype=dtype), layout), {
        name: weight for name, weight in stacked.items() if name.startswith(LAYERS)
    }


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


@pytest.mark.parametrize("layout", ["bnb", "halves"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folder", ["bnb_state/checkpoint", "models/qwen3", "models/gemma3"])
def test_a_layer_is_that_of_a_stacked_load(folder, dtype, layout):
    files, stacked = opened(golden_folder(folder), layout, dtype)
    weights = files.weights()
    assert weights.keys() == stacked.keys()
    for name, weight in stacked.items():
        for layer in (0, 1, -1):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], weight)
            assert_same(weights[name][layer], one)
    assert sum(w.nbytes for w in weights.values()) == files.count * files.packing.nbytes


def test_a_piece_of_the_flattened_array():
    files, stacked = opened(golden_folder("models/qwen3"))
    name = f"{LAYERS}mlp.up_proj.weight"
    stored, flat = files.weights()[name], np.asarray(stacked[name]).reshape(-1)
    each = flat.size // files.count
    for start, stop in ((0, 3), (each - 2, each + 2), (each, each + 1), (0, flat.size)):
        np.testing.assert_array_equal(stored.flat(start, stop), flat[start:stop])
    with pytest.raises(IndexError):
        stored[files.count]


def test_memory_is_used_again():
    files, _ = opened(golden_folder("bnb_state/checkpoint"))
    order = [0, 1, 0, 1, 1, 0]
    kept = [jax.tree.map(np.copy, files.read(layer, 0)) for layer in (0, 1)]
    places = set()
    last = jax.numpy.zeros(())
    with LayerStream(files, order) as stream:
        for layer in order:
            buffers = stream.behind(last)
            places |= {array.unsafe_buffer_pointer() for array in buffers.values()}
            assert_same(buffers, kept[layer])
    assert len(places) == SLOTS * len(files.packing.sizes())


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    folder = clean.bitsandbytes(tmp_path / "model")
    file = folder / "model.safetensors"
    with Shards(folder) as source:
        name = next(n for n in source.names() if n.endswith("1.mlp.up_proj.weight.nested_absmax"))
        offset = source.places[name].entries[name].offset
    content = bytearray(file.read_bytes())
    content[offset : offset + 4] = np.float32(np.nan).tobytes()
    file.write_bytes(content)
    source = Shards(folder)
    files = LayerFiles(Loader(source, ModelConfig.from_dict(source.config)), "bnb")
    files.read(0, 0)
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj\.weight\.nested_absmax") as caught:
        files.read(1, 0)
    assert caught.value.code == "W-FINITE"


def test_the_files_are_closed_with_the_layers():
    files, _ = opened(golden_folder("models/qwen3"))
    (file,) = files.source.files
    assert file.file >= 0
    del files
    gc.collect()
    assert file.file == -1

"""Adapters as GGUF files: delta W is computed from the file as llama.cpp computes it."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.adapters.adapter import Adapter, param_shapes
from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.orbax_io import save_orbax
from qlora_jax.errors import InputError
from qlora_jax.models import ModelConfig
from qlora_jax.models.families import linear_shapes, module_shapes
from qlora_jax.workflows.export_gguf import export_gguf_lora
from tests.golden_data import golden_folder
from tests.tolerances import GGUF_DELTA_ATOL, GGUF_DELTA_RTOL

BASE = golden_folder("adapters/base")
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": 4, "attn_k": 2}


def config_of(folder) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))


def field(reader: gguf.GGUFReader, key: str):
    return reader.get_field(key).contents()


def deltas(path) -> dict[str, np.ndarray]:
    """GGUF name of each weight -> what llama.cpp adds to it: alpha / rank * B A."""
    reader = gguf.GGUFReader(path)
    alpha = np.float32(field(reader, "adapter.lora.alpha"))
    tensors = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    assert len(tensors) == 2 * len(names)
    found = {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = (alpha / np.float32(b.shape[1])) * (b @ a)
    return found


def rows_of_a_llama(delta: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rows from GGUF's, one at a time: row (i, half) was row (half, i)."""
    out, size = np.empty_like(delta), len(delta) // heads
    for row in range(len(delta)):
        head, i, half = row // size, row % size // 2, row % 2
        out[head * size + half * (size // 2) + i] = delta[row]
    return out


@pytest.mark.parametrize("name", ["plain", "second", "rslora", "patterns", "attention_only"])
def test_the_delta_is_pefts(tmp_path, name):
    folder = golden_folder(f"adapters/{name}")
    assert export_gguf_lora(folder, tmp_path / "out.gguf", BASE) == []
    config = config_of(BASE)
    spec = peft.read_adapter(folder, module_shapes(config), config.num_hidden_layers).spec
    tensors = load_file(folder / "adapter_model.safetensors")
    found = deltas(tmp_path / "out.gguf")
    count = 0
    for gguf_name, delta in found.items():
        _, layer, part, _ = gguf_name.split(".")
        target = PARTS[part]
        path = f"base_model.model.model.layers.{layer}.{target}"
        a, b = (tensors[f"{path}.lora_{matrix}.weight"].astype(np.float64) for matrix in "AB")
        expected = spec.scales(target)[int(layer)] * (b @ a)
        delta = rows_of_a_llama(delta, HEADS[part]) if part in HEADS else delta
        np.testing.assert_allclose(delta, expected, rtol=GGUF_DELTA_RTOL, atol=GGUF_DELTA_ATOL)
        count += 2
    assert count == len(tensors)


def test_what_the_file_says(tmp_path):
    export_gguf_lora(golden_folder("adapters/plain"), tmp_path / "out.gguf", BASE)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    settings = json.loads((golden_folder("adapters/plain") / "adapter_config.json").read_text())
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert {key: field(reader, key) for key in keys} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "plain",
        "adapter.type": "lora",
        "adapter.lora.alpha": settings["lora_alpha"],
    }
    assert reader.get_field("adapter.lora.alpha").types == [gguf.GGUFValueType.FLOAT32]
    tensors = load_file(golden_folder("adapters/plain") / "adapter_model.safetensors")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    for matrix in "AB":  # nothing is folded into what needs no folding
        own = tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{matrix}.weight"]
        np.testing.assert_array_equal(stored[f"blk.1.ffn_down.weight.lora_{matrix.lower()}"], own)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_types(tmp_path, kind):
    folder = golden_folder("adapters/plain")
    export_gguf_lora(folder, tmp_path / "exact.gguf", BASE)
    export_gguf_lora(folder, tmp_path / "out.gguf", BASE, type=kind)
    before = gguf.GGUFReader(tmp_path / "exact.gguf").tensors
    for one, other in zip(before, gguf.GGUFReader(tmp_path / "out.gguf").tensors, strict=True):
        assert (one.name, other.tensor_type.name) == (other.name, kind.upper())
        packed = gguf.quants.quantize(np.ascontiguousarray(one.data), other.tensor_type)
        np.testing.assert_array_equal(other.data, packed)


def random_adapter(config: ModelConfig, **settings) -> Adapter:
    spec = make_spec(linear_shapes(config), config.num_hidden_layers, **settings)
    rng = np.random.default_rng(0)
    shapes = param_shapes(spec, linear_shapes(config))
    params = {
        name: {kind: rng.standard_normal(shape).astype(np.float32) for kind, shape in one.items()}
        for name, one in shapes.items()
    }
    for name in spec.targets:  # padding is zero
        for layer, rank in enumerate(spec.ranks(name)):
            params[name]["A"][layer, rank:] = 0
            params[name]["B"][layer, :, rank:] = 0
    return Adapter({n: {k: jnp.asarray(v) for k, v in p.items()} for n, p in params.items()}, spec)


FOLDED = {
    "rank_pattern": {"down_proj": 3, "layers.0.self_attn.qkv_proj": 2},
    "alpha_pattern": {"o_proj": 24},
    "use_rslora": True,
}


@pytest.mark.parametrize("family", ["phi3", "qwen3", "gemma3"])
def test_ranks_and_alphas_that_differ_are_folded_into_b(tmp_path, family):
    folder = golden_folder(f"models/{family}")
    config = config_of(folder)
    settings = FOLDED
    if family != "phi3":
        settings = FOLDED | {"rank_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 2}}
    adapter = random_adapter(config, r=4, alpha=8, **settings)
    peft.save_adapter(tmp_path / "adapter", adapter)
    export_gguf_lora(tmp_path / "adapter", tmp_path / "out.gguf", folder)
    found = deltas(tmp_path / "out.gguf")
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    architecture = field(gguf.GGUFReader(tmp_path / "out.gguf"), "general.architecture")
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    for target in adapter.spec.targets:
        for layer, scale in enumerate(adapter.spec.scales(target)):
            a, b = (np.asarray(matrix, np.float64) for matrix in adapter.layer(target, layer))
            name = names.get_name(f"model.layers.{layer}.{target}")
            expected = scale.astype(np.float64) * (b @ a)
            rounding = 1e-6 * np.abs(expected).max()  # of B, in float32
            np.testing.assert_allclose(found.pop(f"{name}.weight"), expected, atol=rounding)
    assert found == {}


def test_an_adapter_of_orbax(tmp_path):
    config = config_of(BASE)
    adapter = random_adapter(config, r=4, alpha=8, targets=["q_proj"])
    save_orbax(tmp_path / "orbax", adapter)
    peft.save_adapter(tmp_path / "peft", adapter)
    for kind in ("orbax", "peft"):
        export_gguf_lora(tmp_path / kind, tmp_path / f"{kind}.gguf", BASE)
    one, other = (deltas(tmp_path / f"{kind}.gguf") for kind in ("orbax", "peft"))
    assert one.keys() == other.keys() == {f"blk.{i}.attn_q.weight" for i in range(2)}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    with pytest.raises(InputError, match=r"EXPORT-BASE.*does not fit the model: self_attn\.q_proj"):
        export_gguf_lora(tmp_path / "orbax", tmp_path / "q.gguf", golden_folder("models/qwen3"))
    save_orbax(tmp_path / "arrays", {"a": jnp.zeros(3)})
    with pytest.raises(InputError, match="EXPORT-ORBAX"):
        export_gguf_lora(tmp_path / "arrays", tmp_path / "q.gguf", BASE)


@pytest.mark.parametrize(
    ("name", "code"), [("dora", "GGOUT-DORA"), ("modules_to_save", "GGOUT-SAVED")]
)
def test_what_llama_cpp_has_no_file_for_is_refused_with_a_way_out(tmp_path, name, code):
    with pytest.raises(InputError, match=rf"{code}.*Try: qlora-jax merge, and export"):
        export_gguf_lora(golden_folder(f"adapters/{name}"), tmp_path / "out.gguf", BASE)
    assert list(tmp_path.iterdir()) == []


def test_other_types_and_places_are_refused(tmp_path):
    plain = golden_folder("adapters/plain")
    with pytest.raises(InputError, match=r"GGOUT-TYPE.*'q8_0' \(expected f32, f16, bf16\)"):
        export_gguf_lora(plain, tmp_path / "out.gguf", BASE, type="q8_0")
    with pytest.raises(InputError, match="GG-SUFFIX"):
        export_gguf_lora(plain, tmp_path / "out", BASE)
    with pytest.raises(InputError, match="PEFT-FOLDER"):
        export_gguf_lora(tmp_path / "nothing", tmp_path / "out.gguf", BASE)
    (tmp_path / "out.gguf").touch()
    with pytest.raises(InputError, match="OUT-EXISTS"):
        export_gguf_lora(plain, tmp_path / "out.gguf", BASE)


def test_an_alpha_beyond_float32_is_refused(tmp_path):
    config = config_of(BASE)
    adapter = random_adapter(config, r=4, alpha=3e38, targets=["q_proj"], use_rslora=True)
    peft.save_adapter(tmp_path / "adapter", adapter)
    with pytest.raises(InputError, match=r"GG-RANGE.*lora_alpha: 6e\+38 is too large"):
        export_gguf_lora(tmp_path / "adapter", tmp_path / "out.gguf", BASE)

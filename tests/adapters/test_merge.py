import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.init import init_lora
from qlora_jax.adapters.merge import merge_weight, merged_config, merged_weights
from qlora_jax.errors import InputError
from qlora_jax.quantization.tensor import QuantizedTensor, quantize
from tests.adapters.small_model import SHAPES, SmallModel
from tests.random_arrays import normal
from tests.tolerances import MERGE_ATOL, MERGE_RTOL

LAYERS = 3
Q = "self_attn.q_proj"


def trained(lora: Adapter) -> Adapter:
    """`lora` with a B that is not zero."""
    params = {name: dict(pair, B=normal(1, *pair["B"].shape)) for name, pair in lora.params.items()}
    return Adapter(params, lora.spec)


def new_adapter(**settings) -> Adapter:
    return trained(init_lora(SmallModel(), key=jax.random.key(0), **settings))


def dense_model() -> SmallModel:
    random = np.random.default_rng(0)
    held = {
        f"model.layers.{name}.weight": jnp.float32(random.normal(size=(LAYERS, *shape)))
        for name, shape in SHAPES.items()
    }
    held["model.embed_tokens.weight"] = jnp.float32(random.normal(size=(9, 8)))
    held["model.layers.input_layernorm.weight"] = jnp.ones((LAYERS, 8))
    return SmallModel(held)


@dataclasses.dataclass(frozen=True)
class TiedConfig:
    """What `merged_config` asks of a configuration."""

    tie_word_embeddings: bool = True


def by_layer(model: SmallModel) -> dict[str, np.ndarray]:
    """The weights under Hugging Face's names."""
    found = {}
    for stacked, array in model.held.items():
        inner = stacked.removeprefix("model.layers.")
        if inner == stacked:
            found[stacked] = np.asarray(array)
        else:
            found |= {f"model.layers.{i}.{inner}": np.asarray(array[i]) for i in range(LAYERS)}
    return found


def expected(weight, lora: Adapter, name: str, layer: int) -> np.ndarray:
    """W + scale * B A in float64."""
    A, B = (np.float64(matrix) for matrix in lora.layer(name, layer))
    return np.float64(weight) + float(lora.spec.scales(name)[layer]) * B @ A


@pytest.mark.usefixtures("strict_promotion")
def test_merge_weight_is_the_formula_in_float32():
    lora = new_adapter(r=2, targets=["q_proj"])
    weight = normal(2, 16, 8, dtype="bfloat16")
    merged = merge_weight(weight, *lora.layer(Q, 1), 8.0)
    assert merged.dtype == jnp.float32
    wanted = expected(weight, lora, Q, 1)
    np.testing.assert_allclose(merged, wanted, rtol=MERGE_RTOL, atol=MERGE_ATOL)


def test_every_weight_comes_out_once_and_only_targets_change():
    model, lora = dense_model(), new_adapter(r=2, targets=["q_proj", "layers.1.mlp.up_proj"])
    before = by_layer(model)
    pairs = list(merged_weights(model, lora))
    after = dict(pairs)
    assert len(pairs) == len(after)
    assert after.keys() == before.keys()
    adapted = {f"model.layers.{i}.{Q}.weight": (Q, i) for i in range(LAYERS)}
    adapted["model.layers.1.mlp.up_proj.weight"] = ("mlp.up_proj", 1)
    for name, array in after.items():
        if name in adapted:
            wanted = expected(before[name], lora, *adapted[name])
            np.testing.assert_allclose(array, wanted, rtol=MERGE_RTOL, atol=MERGE_ATOL)
            assert np.abs(array - before[name]).max() > 0.1
        else:
            np.testing.assert_array_equal(array, before[name])


def test_doras_rows_have_the_lengths_that_were_trained():
    model = dense_model()
    fresh = init_lora(model, r=2, targets=["q_proj"], use_dora=True, key=jax.random.key(0))
    pair = trained(fresh).params[Q]
    lora = Adapter({Q: pair | {"m": pair["m"] * jnp.linspace(-1, 2, 16)}}, fresh.spec)
    before, after = by_layer(model), dict(merged_weights(model, lora))
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.{Q}.weight"
        plain = expected(before[name], lora, Q, layer)
        wanted = lora.params[Q]["m"][layer][:, None] * plain
        wanted = wanted / np.linalg.norm(plain, axis=1, keepdims=True)
        np.testing.assert_allclose(after[name], wanted, rtol=MERGE_RTOL, atol=MERGE_ATOL)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_saved_modules_replace_the_bases(tied, names):
    model = dense_model()
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not tied:
        model.held[head] = jnp.ones((9, 8))
    fresh = init_lora(model, r=2, modules_to_save=names, key=jax.random.key(0))
    moved = {name: {"weight": fresh.params[name]["weight"] + 1} for name in names}
    lora = Adapter(fresh.params | moved, fresh.spec)
    source = Original(by_layer(model))
    for how in ({}, {"base": "original", "source": source}):
        after = dict(merged_weights(model, lora, **how))
        assert after.keys() == by_layer(model).keys() | {head}
        for module, name in (("embed_tokens", embedding), ("lm_head", head)):
            wanted = model.held.get(name, model.held[embedding])
            np.testing.assert_array_equal(after[name], wanted + (module in names))
    assert (head in source.asked) == (not tied and "lm_head" not in names)


def test_only_saved_modules_untie_a_model():
    tied = TiedConfig()
    saved = init_lora(dense_model(), r=2, modules_to_save=["lm_head"], key=jax.random.key(0))
    assert merged_config(tied, saved) == TiedConfig(tie_word_embeddings=False)
    assert merged_config(tied, new_adapter(r=2)) is tied


def test_a_4_bit_base_is_merged_as_the_model_computes_with_it():
    shapes = {Q: (64, 128)}
    base = jax.vmap(quantize)(normal(3, LAYERS, *shapes[Q]))
    assert isinstance(base, QuantizedTensor)
    model = SmallModel({f"model.layers.{Q}.weight": base}, shapes)
    lora = trained(init_lora(model, r=4, key=jax.random.key(0)))
    merged = dict(merged_weights(model, lora))
    dense = base.dequantize("float32")
    for layer in range(LAYERS):
        found = merged[f"model.layers.{layer}.{Q}.weight"]
        wanted = expected(dense[layer], lora, Q, layer)
        np.testing.assert_allclose(found, wanted, rtol=MERGE_RTOL, atol=MERGE_ATOL)


class Original:
    """A source that remembers what was asked of it."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights, self.asked = weights, []

    def read(self, name: str) -> np.ndarray:
        self.asked.append(name)
        return self.weights[name]


def test_original_weights_are_read_one_by_one_as_they_are_asked_for():
    model, lora = dense_model(), new_adapter(r=2)
    blank = SmallModel({name: jnp.zeros_like(array) for name, array in model.held.items()})
    source, wanted = Original(by_layer(model)), dict(merged_weights(model, lora))
    for count, (name, array) in enumerate(
        merged_weights(blank, lora, base="original", source=source), start=1
    ):
        assert len(source.asked) == count
        np.testing.assert_array_equal(array, wanted[name])
    assert sorted(source.asked) == sorted(wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_is_rounded_once(dtype):
    model, lora = dense_model(), new_adapter(r=2)
    wide = dict(merged_weights(model, lora, dtype="float32"))
    for name, array in merged_weights(model, lora, dtype=dtype):
        assert array.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(array, wide[name].astype(array.dtype))


def test_a_merged_weight_too_large_for_its_type_is_named():
    lora = new_adapter(r=2, targets=["q_proj"], alpha=1e6)
    pairs = merged_weights(dense_model(), lora, dtype="float16")
    with pytest.raises(
        InputError, match=r"layers\.0\.self_attn\.q_proj\.weight: not finite in float16"
    ):
        list(pairs)


def test_an_adapter_that_is_not_finite_is_refused_before_any_weight():
    lora = new_adapter(r=2, targets=["q_proj"])
    pair = lora.params[Q]
    spoiled = Adapter({Q: dict(pair, A=pair["A"].at[2, 1, 5].set(jnp.inf))}, lora.spec)
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.q_proj\.lora_A: inf at \[1, 5\]"):
        merged_weights(dense_model(), spoiled)


@pytest.mark.parametrize("base", ["original", "quantized"])
def test_a_base_that_is_not_there_is_refused(base):
    with pytest.raises(InputError, match=f"merge: base: .*{base}"):
        merged_weights(dense_model(), new_adapter(r=2), base=base)

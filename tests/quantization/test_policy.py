"""Linears of the decoder layers are covered; what cannot be is refused with what can."""

import pytest

from qlora_jax.errors import InputError
from qlora_jax.quantization.policy import QuantizationConfig

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
DENSE = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.input_layernorm.weight",
    "model.layers.3.post_attention_layernorm.weight",
    "model.layers.self_attn.q_norm.weight",
    "model.layers.self_attn.q_proj.bias",
    "lm_head.weight",
]


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("layers", ["model.layers.", "model.layers.11."])
def test_linears_are_covered(layers, linear):
    assert QuantizationConfig().covers(f"{layers}{linear}.weight")


@pytest.mark.parametrize("name", DENSE)
def test_the_rest_stays_dense(name):
    assert not QuantizationConfig().covers(name)


def test_the_head_is_covered_when_asked_for():
    config = QuantizationConfig(quantize_lm_head=True)
    assert config.covers("lm_head.weight")
    assert [name for name in DENSE if config.covers(name)] == ["lm_head.weight"]


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(InputError) as error:
        QuantizationConfig(kind="nf8")
    assert str(error.value) == (
        "error[CFG-QUANT]: quant_type: unknown kind 'nf8' (expected one of nf4, fp4, int4). "
        "Try: quant_type=nf4."
    )


@pytest.mark.parametrize("size", [0, 16, 48, 8192])
def test_a_block_size_that_cannot_be_is_refused(size):
    with pytest.raises(InputError) as error:
        QuantizationConfig(block_size=size)
    assert str(error.value) == (
        f"error[CFG-QUANT]: block_size: is {size} "
        "(expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096)."
    )


def test_is_hashable_and_compared_by_value():
    assert {QuantizationConfig(), QuantizationConfig(kind="nf4")} == {QuantizationConfig()}

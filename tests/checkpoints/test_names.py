"""Unknown, missing and doubled names are three different, loud errors."""

import pytest

from qlora_jax.checkpoints.names import hugging_face_names, join, name_table, split
from qlora_jax.errors import InputError

EXPECTED = {"model.embed_tokens.weight": (8, 4), "model.layers.mlp.up_proj.weight": (4, 4)}
GOOD = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))]


@pytest.mark.parametrize(
    ("name", "stacked", "layer"),
    [
        ("model.layers.13.mlp.up_proj.weight", "model.layers.mlp.up_proj.weight", 13),
        ("model.norm.weight", "model.norm.weight", None),
        ("model.layers.x.weight", "model.layers.x.weight", None),
    ],
)
def test_split_and_join(name, stacked, layer):
    assert split(name) == (stacked, layer)
    assert join(stacked, layer) == name


def test_table():
    assert name_table(reversed(GOOD), EXPECTED, 2, "x") == {
        "model.embed_tokens.weight": GOOD[:1],
        "model.layers.mlp.up_proj.weight": GOOD[1:],
    }


def test_all_of_one_layer_come_together():
    stacked = ["e", "model.layers.a", "model.layers.b", "norm"]
    assert hugging_face_names(stacked, 2) == {
        "e": "e",
        "model.layers.0.a": "model.layers.a",
        "model.layers.0.b": "model.layers.b",
        "model.layers.1.a": "model.layers.a",
        "model.layers.1.b": "model.layers.b",
        "norm": "norm",
    }


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (
            [*GOOD, "model.layers.0.mlp.upp_proj.weight"],
            "W-UNKNOWN",
            "the nearest name is model.layers.0.mlp.up_proj",
        ),
        ([*GOOD, "model.layers.2.mlp.up_proj.weight"], "W-UNKNOWN", "layers 0 to 1"),
        (GOOD[:2], "W-MISSING", "missing weights: model.layers.1.mlp.up_proj.weight"),
        ([*GOOD, "model.layers.01.mlp.up_proj.weight"], "W-DOUBLE", "'model.layers.01.mlp"),
    ],
)
def test_wrong_names(names, code, words):
    with pytest.raises(InputError) as error:
        name_table(names, EXPECTED, 2, "folder")
    assert error.value.code == code
    assert words in str(error.value)
    assert str(error.value).startswith(f"error[{code}]: folder: ")


def test_a_missing_head_hints_at_tying():
    with pytest.raises(InputError, match=r"missing weights: lm_head.weight.*tie_word_embeddings"):
        name_table(GOOD, {**EXPECTED, "lm_head.weight": (8, 4)}, 2, "folder")


def test_old_buffers_are_tolerated():
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    assert name_table([*GOOD, *buffers], EXPECTED, 2, "x")

"""A configuration for a model: how long its texts may be."""

import json

import pytest

from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.for_model import fitted
from tests.golden_data import golden_folder

SHAPE = ModelConfig.from_dict(
    json.loads((golden_folder("models/llama") / "config.json").read_text())
)
MOST = SHAPE.max_position_embeddings


@pytest.mark.parametrize("length", [MOST - 1, MOST])
def test_what_the_model_has_positions_for_is_taken(length):
    config = TrainConfig(max_seq_length=length)
    assert fitted(config, SHAPE) == (config, [])


def test_a_default_that_is_longer_is_cut_with_a_note():
    config, notes = fitted(TrainConfig(), SHAPE)
    assert config.max_seq_length == MOST
    assert notes == [f"max_seq_length is {MOST:,}, the model's max_position_embeddings"]


def test_a_longer_one_that_was_asked_for_is_refused():
    with pytest.raises(InputError, match=rf"RUN-LENGTH.*{MOST + 1}.*at most {MOST}"):
        fitted(TrainConfig(max_seq_length=MOST + 1), SHAPE)

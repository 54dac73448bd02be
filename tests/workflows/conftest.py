"""A folder with a tiny model and rows, and the model opened."""

import pytest

from qlora_jax.workflows.open import load
from tests.tiny_model import write_tiny_model
from tests.workflows.runs import write_rows


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model")
    write_rows(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="session")
def opened(home):
    """(model, tokenizer), 4-bit and float32."""
    return load(home / "model", dtype="float32")

"""A folder with a tiny model and rows, and the model opened."""

import pytest

from qlora_jax.workflows import recorder
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


@pytest.fixture
def loss_is_plotted():
    """For a test that looks at loss.png, whose drawing is a quarter of a second of a run."""


@pytest.fixture(autouse=True)
def loss_is_not_plotted(request):
    with pytest.MonkeyPatch.context() as patch:
        if "loss_is_plotted" not in request.fixturenames:
            patch.setattr(recorder, "plot_loss", lambda *rows, **how: None)
        yield

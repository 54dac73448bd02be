"""Which files go beside a copy's weights: the model's own, or an adapter's tokenizer instead."""

import pytest

from qlora_jax.workflows.companions import companions_of
from qlora_jax.workflows.open import open_source
from tests.tiny_model import write_tiny_model


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model")


def test_an_adapters_tokenizer_comes_instead_of_the_models(tmp_path, model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        files = companions_of(source, first=adapter)
    assert files == {
        "tokenizer.json": adapter / "tokenizer.json",
        "generation_config.json": model / "generation_config.json",
    }


def test_a_template_alone_is_no_tokenizer(tmp_path, model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with open_source(model) as source:
        own, files = companions_of(source), companions_of(source, first=adapter)
    assert own["tokenizer.json"] == model / "tokenizer.json"
    assert files == own | {"chat_template.jinja": adapter / "chat_template.jinja"}

"""What the tests open damaged files with: the calls that the commands make, on tiny models."""

from pathlib import Path
from typing import Any

import numpy as np


def weights(path: Path) -> dict[str, Any]:
    """A model's folder or GGUF file, as `load` opens it, dense and in float32."""
    import dataclasses

    from qlora_jax.checkpoints.load import load_weights
    from qlora_jax.models.config import ModelConfig
    from qlora_jax.workflows.open import open_source

    path = path / "model.gguf" if (path / "model.gguf").exists() else path
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        arrays = load_weights(source, config, dtype="float32")
    return {"config": dataclasses.asdict(config)} | flat(arrays)


def adapter(path: Path) -> dict[str, Any]:
    """A PEFT adapter for the tiny model."""
    from qlora_jax.checkpoints.peft import read_adapter
    from tests.reliability.clean import ADAPTED, LAYERS

    found = read_adapter(path, ADAPTED, LAYERS)
    return {"config": {"targets": found.spec.targets}} | flat(found.params)


def tokenizer(path: Path) -> dict[str, Any]:
    """A tokenizer's folder, and what it makes of a text."""
    from qlora_jax.data.tokenizer import load_tokenizer

    found = load_tokenizer(path, vocab_size=64)
    ids = np.asarray(found.encode("abba", add_special_tokens=False))
    return {"ids": ids, "config": {"tokens": found.get_vocab()}}


def orbax(path: Path) -> dict[str, Any]:
    """A tree that `save_orbax` wrote."""
    from qlora_jax.checkpoints.orbax_io import load_orbax

    return flat(load_orbax(path))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree as arrays, by path."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

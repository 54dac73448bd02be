"""PEFT folders of a small model's adapters, and what is changed in them."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.errors import InputError
from tests.adapters.small_model import SmallModel

MODEL = SmallModel()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def trained(**settings) -> Adapter:
    """An adapter of random numbers, zero where it is padding."""
    random = np.random.default_rng(0)
    shapes = MODEL.module_shapes()
    spec = make_spec(shapes, MODEL.config.num_hidden_layers, **settings)
    params = {}
    for name in spec.targets:
        out, width = shapes[name]
        ranks = spec.ranks(name)
        real = np.float32(np.arange(max(ranks)) < np.array(ranks)[:, None])  # (L, r)
        A = real[:, :, None] * np.float32(random.normal(size=(*real.shape, width)))
        B = real[:, None, :] * np.float32(random.normal(size=(len(ranks), out, max(ranks))))
        params[name] = {"A": jnp.asarray(A), "B": jnp.asarray(B)}
        if spec.use_dora:
            m = real.any(1)[:, None] * np.float32(random.normal(size=(len(ranks), out)))
            params[name]["m"] = jnp.asarray(m)
    for name in spec.modules_to_save:
        params[name] = {"weight": jnp.asarray(np.float32(random.normal(size=shapes[name])))}
    return Adapter(params, spec)


def saved(folder: Path, **settings) -> Path:
    save_adapter(folder / "adapter", trained(**settings))
    return folder / "adapter"


def edit_config(folder: Path, **changes) -> None:
    """Sets keys of adapter_config.json; `...` removes one."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, edit) -> None:
    """Applies `edit` to the dict of tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refused(folder: Path, message: str) -> InputError:
    with pytest.raises(InputError, match=message) as error:
        load_adapter(folder, MODEL)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return error.value

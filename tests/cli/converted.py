"""A home for tests of the converters: a tiny model, its 4-bit copy, adapters, Orbax folders."""

import shutil
from pathlib import Path

import jax
import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.init import init_lora
from qlora_jax.checkpoints.orbax_io import save_orbax
from qlora_jax.workflows.adapter_folder import save_adapter
from qlora_jax.workflows.convert import parameters, quantize_checkpoint
from qlora_jax.workflows.open import load
from tests.golden_data import golden_folder
from tests.tiny_model import FEW_TARGETS, write_tiny_model


def filled(fresh: Adapter) -> Adapter:
    """An adapter that does something: every array random, lengths and saved modules near theirs."""
    random = np.random.default_rng(0)
    params = {
        module: {
            kind: array + random.normal(size=array.shape).astype(np.float32) * 0.05
            for kind, array in arrays.items()
        }
        for module, arrays in fresh.params.items()
    }
    return Adapter(jax.tree.map(jax.numpy.asarray, params), fresh.spec)


def write_home(folder: Path) -> Path:
    """Writes model, model-4bit, bare (no tokenizer), run (an adapter), Orbax folders, a text."""
    write_tiny_model(folder / "model")
    (folder / "short.txt").write_text("To be or not to be? " * 7)
    shutil.copytree(golden_folder("models/llama"), folder / "bare")
    quantize_checkpoint(folder / "model", folder / "model-4bit")
    model, tokenizer = load(folder / "model-4bit", quantization=None)
    lora = filled(init_lora(model, r=4, alpha=8, targets=FEW_TARGETS, key=jax.random.key(0)))
    save_adapter(folder / "run", lora, model, tokenizer, base_model_name="model")
    save_orbax(folder / "orbax-run", lora)
    save_orbax(
        folder / "orbax-model",
        parameters(folder / "model", None),
        metadata={"model": "model"},
    )
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every path below a folder, and what the files hold."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}

"""Golden models in 4 bits, and adapters that do something, as if they had been trained."""

import jax

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.init import init_lora
from qlora_jax.models import Decoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import golden_folder
from tests.random_arrays import normals_like


def opened(name: str, kind: str = "nf4", double_quant: bool = True, head=False) -> Decoder:
    """A golden model of nine, quantized, computed in float32."""
    how = QuantizationConfig(kind, 64, double_quant, quantize_lm_head=head)
    with open_source(golden_folder(f"models/{name}")) as source:
        return load_model(source, quantization=how, dtype="float32")


def trained(base: Decoder, seed: int = 0, **settings) -> Adapter:
    """An adapter with B not zero, and what was trained in full moved away from the base's."""
    fresh = init_lora(base, key=jax.random.key(seed), **{"r": 4, "alpha": 8} | settings)

    def moved(path, leaf, move):
        # A is random already, and zero where a layer's rank is smaller than another's.
        return leaf if path[-1].key == "A" else leaf + move

    moves = normals_like(fresh.params, seed + 1, size=0.05)
    return Adapter(jax.tree.map_with_path(moved, fresh.params, moves), fresh.spec)

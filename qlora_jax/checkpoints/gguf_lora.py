"""A LoRA adapter as llama.cpp's GGUF file: A and B of each weight, and one alpha for all of them.

    W x + alpha / rank * B A x      alpha of the file; rank is B's inner size, which may differ

The alpha that a tensor would need, scale * rank, can differ too: by alpha_pattern, and by rank with
rsLoRA. The file gets the one that most need, and the B of each other is multiplied by its share, so
that the product is the same.
"""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import LARGEST_ALPHA, LoraSpec, module_path
from qlora_jax.checkpoints.gguf_names import ARCHITECTURES
from qlora_jax.checkpoints.gguf_tensors import architecture_of, gguf_name, stored
from qlora_jax.checkpoints.gguf_write import Value
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig

MERGE = "qlora-jax merge, and export --format gguf of what it wrote"


def lora_metadata(
    spec: LoraSpec, config: ModelConfig, name: str, where: str
) -> tuple[dict[str, Value], float]:
    """The keys of an adapter's file, and its alpha, which is one of them.

    Args:
      name: of the adapter, for people.
      where: the adapter, for errors.

    Raises:
      InputError: GGOUT-DORA, GGOUT-SAVED, GG-RANGE for an alpha beyond float32.
    """
    if spec.use_dora:
        raise InputError("GGOUT-DORA", where, "is DoRA", "a LoRA that llama.cpp reads", MERGE)
    if spec.modules_to_save:
        found = f"holds modules trained in full: {', '.join(spec.modules_to_save)}"
        raise InputError("GGOUT-SAVED", where, found, "a LoRA that llama.cpp reads", MERGE)
    needed = Counter(alpha for target in spec.targets for alpha in alphas(spec, target) if alpha)
    alpha = needed.most_common(1)[0][0]
    if alpha > LARGEST_ALPHA:
        raise InputError("GG-RANGE", f"{where}: lora_alpha", f"{alpha} is too large for float32")
    metadata: dict[str, Value] = {
        "general.architecture": architecture_of(config),
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    return metadata, alpha


def alphas(spec: LoraSpec, target: str) -> list[float]:
    """The alpha that each layer of a target needs in a file; 0 where it has no adapter."""
    pairs = zip(spec.alphas(target), spec.ranks(target), strict=True)
    return [
        (alpha * math.sqrt(rank) if spec.use_rslora else alpha) if rank else 0.0
        for alpha, rank in pairs
    ]


def lora_tensors(
    adapter: Adapter, config: ModelConfig, alpha: float
) -> Iterator[tuple[str, np.ndarray]]:
    """`blk.0.attn_q.weight.lora_a` (rank, in) and `.lora_b` (out, rank) of each, float32.

    B has the rows of its weight, so it gets their order.
    """
    row = ARCHITECTURES[architecture_of(config)]
    for target in adapter.spec.targets:
        for layer, needed in enumerate(alphas(adapter.spec, target)):
            if not needed:
                continue
            weight = f"{module_path(layer, target)}.weight"
            A, B = (np.asarray(matrix, np.float32) for matrix in adapter.layer(target, layer))
            if needed != alpha:
                B = B * np.float32(needed / alpha)
            yield f"{gguf_name(weight, row)}.lora_a", A
            yield f"{gguf_name(weight, row)}.lora_b", stored(weight, B, config)

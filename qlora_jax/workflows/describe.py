"""What is in a model's folder, a GGUF file or an adapter, from their headers: no weight is read."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.bnb4bit import QuantState, is_4bit, read_states
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.names import name_table, split
from qlora_jax.checkpoints.peft import CONFIG, TENSORS, present
from qlora_jax.checkpoints.safetensors_header import Entry
from qlora_jax.checkpoints.shards import SafetensorsFile, Shards
from qlora_jax.checkpoints.strict_json import read_json
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import linear_shapes, weight_shapes
from qlora_jax.workflows.open import open_source

ADAPTER_PREFIX = "base_model.model."  # PEFT wraps the model twice, and its keys say so
ADAPTER_FACTS = ("r", "lora_alpha", "use_rslora", "lora_dropout", "base_model_name_or_path")
MODEL_FACTS = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Weight:
    """Layers of one weight that have the same shape and are stored alike.

    Attributes:
      name: Hugging Face's name without the layer's number.
      layers: how many there are; 1 for a weight outside the layers.
      shape: of one layer's dense matrix.
      stored: a dtype, a GGUF block type, or the code, block size and scales of a 4-bit weight.
      nbytes: of all layers as stored, scales included.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    stored: str
    nbytes: int

    @property
    def parameters(self) -> int:
        """Numbers in all layers."""
        return self.layers * math.prod(self.shape)


@dataclass(frozen=True)
class Description:
    """What was found at a path.

    Attributes:
      path: as it was given.
      kind: "model", "4-bit model", "GGUF" or "adapter".
      facts: the fields of its configuration that say how large it is.
      weights: in the model's order.
      targets: what `target_modules` can name; of an adapter, what it adapts.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    weights: list[Weight]
    targets: list[str]

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def bits_per_parameter(self) -> float:
        """Of all weights as stored, scales included."""
        return 8 * self.nbytes / self.parameters


def describe(path: str | Path) -> Description:
    """Reads the headers of a model's folder, a GGUF file or a PEFT adapter's folder.

    Raises:
      InputError: nothing is there, or it cannot be used: names and shapes are checked as when it
        is loaded.
    """
    if Path(path, CONFIG).exists():
        return describe_adapter(Path(path))
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        layers = config.num_hidden_layers
        states = {}
        if isinstance(source, Shards) and is_4bit(source.config, str(path)):
            states = read_states(source)
        beside = beside_of(source.names(), states)
        own = [name for name in source.names() if name not in beside]
        table = name_table(own, weight_shapes(config), layers, str(path))
        names = [name for row in table.values() for name in row]
        return Description(
            str(path),
            kind="GGUF" if isinstance(source, GGUF) else "4-bit model" if states else "model",
            facts={key: getattr(config, key) for key in MODEL_FACTS},
            weights=grouped(stored_weight(source, name, states, beside) for name in names),
            targets=list(linear_shapes(config)),
        )


def describe_adapter(folder: Path) -> Description:
    """The same for a PEFT adapter; its targets are those that it adapts."""
    config = read_json(present(folder, CONFIG))
    with contextlib.closing(
        SafetensorsFile(present(folder, TENSORS), str(folder / TENSORS))
    ) as file:
        entries = file.entries
    modules = {key.removeprefix(ADAPTER_PREFIX): entry for key, entry in entries.items()}
    weights = grouped(one_weight(name, entry) for name, entry in modules.items())
    adapted = [weight.name.split(".lora_")[0] for weight in weights if ".lora_" in weight.name]
    return Description(
        str(folder),
        kind="adapter",
        facts={key: config[key] for key in ADAPTER_FACTS if config.get(key) is not None},
        weights=weights,
        targets=list(dict.fromkeys(name.removeprefix("model.layers.") for name in adapted)),
    )


def beside_of(names: list[str], states: dict[str, QuantState]) -> dict[str, str]:
    """The 4-bit weight that each tensor of scales and tables belongs to."""
    owners = ((name, name.rsplit(".weight.", 1)[0] + ".weight") for name in names)
    return {name: owner for name, owner in owners if name != owner and owner in states}


def stored_weight(
    source: Shards | GGUF, name: str, states: dict[str, QuantState], beside: dict[str, str]
) -> Weight:
    """One tensor of a model as it is stored."""
    if isinstance(source, GGUF):
        tensor = source.tensors[source.gguf_names[name]]
        return Weight(split(name)[0], 1, tensor.shape, tensor.block.name, tensor.nbytes)
    if name not in states:
        return one_weight(name, source.places[name].entries[name])
    state = states[name]
    scales = "float32 scales" if state.offset is None else "8-bit scales"
    parts = [name, *(part for part, owner in beside.items() if owner == name)]
    nbytes = sum(source.places[part].entries[part].nbytes for part in parts)
    stored = f"{state.kind}, block {state.block_size}, {scales}"
    return Weight(split(name)[0], 1, state.shape, stored, nbytes)


def one_weight(name: str, entry: Entry) -> Weight:
    """One dense tensor of a safetensors file."""
    return Weight(split(name)[0], 1, entry.shape, entry.dtype.name, entry.nbytes)


def grouped(weights: Iterable[Weight]) -> list[Weight]:
    """Single layers counted together where name, shape and storage agree, in the order seen."""
    layers, nbytes = Counter(), Counter()
    for weight in weights:
        key = (weight.name, weight.shape, weight.stored)
        layers[key] += 1
        nbytes[key] += weight.nbytes
    return [
        Weight(name, count, shape, stored, nbytes[name, shape, stored])
        for (name, shape, stored), count in layers.items()
    ]

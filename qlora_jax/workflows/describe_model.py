"""What is in a model's folder or a GGUF file, from headers: no weight is read."""

from pathlib import Path

from qlora_jax.checkpoints.bnb4bit import QuantState, is_4bit, is_beside, packed_specs, read_states
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import refuse_other_shape, source_dtype
from qlora_jax.checkpoints.names import name_table, split
from qlora_jax.checkpoints.peft import read_extra
from qlora_jax.checkpoints.safetensors_header import Entry
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import linear_shapes, weight_shapes
from qlora_jax.workflows.companions import GGUF_TOKENIZER, TOKENIZER, companions, names_tokenizer
from qlora_jax.workflows.description import Description, Weight, grouped
from qlora_jax.workflows.open import open_source

FACTS = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    "tie_word_embeddings",
)


def describe_model(path: str | Path) -> Description:
    """Sizes, storage and names; checked as when the model is loaded.

    Raises:
      InputError: nothing is there, or it cannot be used.
    """
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        states = {}
        if isinstance(source, Shards) and is_4bit(source.config, str(path)):
            states = read_states(source)
        own = [name for name in source.names() if not (states and is_beside(name))]
        shapes = weight_shapes(config)
        table = name_table(own, shapes, config.num_hidden_layers, str(path))
        rows = {
            name: stored_weight(source, name, states.get(name))
            for row in table.values()
            for name in row
        }
        for name, row in rows.items():
            refuse_other_shape(f"{path}: {name}", row.shape, shapes[split(name)[0]])
        facts = {key: getattr(config, key) for key in FACTS}
        gguf = isinstance(source, GGUF)
        return Description(
            str(path),
            kind="GGUF" if gguf else "4-bit model" if states else "model",
            facts=facts if gguf else {**facts, "dtype": source_dtype(source)},
            weights=grouped(rows.values()),
            targets=list(linear_shapes(config)),
            files=[source.path.name] if gguf else [Path(f.where).name for f in source.files],
            tokenizer=tokenizer_of(source),
            made={} if gguf else read_extra(source.path),
        )


def tokenizer_of(source: Shards | GGUF) -> list[str]:
    """The files of a folder's tokenizer, or the kind that a GGUF file's metadata describes."""
    if isinstance(source, Shards):
        return [name for name in companions(source.path) if name in TOKENIZER]
    if not names_tokenizer(source):
        return []
    return [f"{source.metadata[GGUF_TOKENIZER]}, in the metadata"]


def stored_weight(source: Shards | GGUF, name: str, state: QuantState | None) -> Weight:
    """One tensor of a model as it is stored."""
    if isinstance(source, GGUF):
        tensor = source.tensors[source.gguf_names[name]]
        return Weight(split(name)[0], 1, tensor.shape, tensor.block.name, tensor.nbytes)
    if state is None:
        return one_weight(name, source.places[name].entries[name])
    scales = "float32 scales" if state.offset is None else "8-bit scales"
    parts = packed_specs(name, state)
    nbytes = sum(source.places[part].entries[part].nbytes for part in parts)
    stored = f"{state.kind}, block {state.block_size}, {scales}"
    return Weight(split(name)[0], 1, state.shape, stored, nbytes)


def one_weight(name: str, entry: Entry) -> Weight:
    """One dense tensor of a file."""
    return Weight(split(name)[0], 1, tuple(entry.shape), entry.dtype.name, entry.nbytes)

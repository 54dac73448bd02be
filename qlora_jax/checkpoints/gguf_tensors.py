"""A model's weights as llama.cpp stores them: names, order of rows, norms, number formats."""

from collections.abc import Mapping

import numpy as np

from qlora_jax.checkpoints.gguf_names import (
    ARCHITECTURES,
    ROPE_FREQUENCIES,
    ROPE_LONG,
    ROPE_SHORT,
    Architecture,
    join_halves,
)
from qlora_jax.checkpoints.gguf_pack import BY_NAME
from qlora_jax.checkpoints.gguf_rope import llama3_factors
from qlora_jax.checkpoints.gguf_write import Spec
from qlora_jax.checkpoints.names import hugging_face_names, split
from qlora_jax.errors import listed
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.weight_names import LAYERS

# llama.cpp has no architecture of its own for Mistral: it is a Llama without its window.
NAMES = {row.model_type: name for name, row in ARCHITECTURES.items()} | {"mistral": "llama"}
EMBEDDINGS_AND_HEAD = ("token_embd.weight", "output.weight")


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name of a model's family."""
    return NAMES[config.model_type]


def gguf_name(name: str, row: Architecture) -> str:
    """`model.layers.0.self_attn.q_proj.bias` -> `blk.0.attn_q.bias`."""
    parts = {target: part for table in (row.top, row.layer) for part, target in table.items()}
    stacked, layer = split(name)
    stem, _, suffix = stacked.removeprefix(LAYERS).rpartition(".")
    return f"{parts[stem]}.{suffix}" if layer is None else f"blk.{layer}.{parts[stem]}.{suffix}"


def weight_table(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face name of every weight -> its GGUF name and shape, in a file's order."""
    row, shapes = ARCHITECTURES[architecture_of(config)], weight_shapes(config)
    names = hugging_face_names(shapes, config.num_hidden_layers)
    return {name: (gguf_name(name, row), shapes[stacked]) for name, stacked in names.items()}


def stored(name: str, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A weight as llama.cpp's converter stores it.

    Norms get what their family adds to them, and q and k of some families the row order of
    llama.cpp's rotary positions; biases of these too, and the B of an adapter.

    Args:
      name: Hugging Face's, of a layer or not.
      weight: in Hugging Face's order, (out, ...).
    """
    stem = split(name)[0].removeprefix(LAYERS).rpartition(".")[0]
    if config.family.norm_offset and name.endswith("norm.weight"):
        return weight.astype(np.float32) + np.float32(config.family.norm_offset)
    if stem in ARCHITECTURES[architecture_of(config)].interleaved:
        query = stem.endswith("q_proj")
        heads = config.num_attention_heads if query else config.num_key_value_heads
        return join_halves(weight, heads)
    return weight


def rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """What each rotary frequency is divided by, float32 (half,), for the rules that need it."""
    rope = config.rope
    if rope.rule == "llama3":
        return {ROPE_FREQUENCIES: llama3_factors(rope, config.head_dim)}
    if rope.rule == "longrope":
        pair = {ROPE_LONG: rope.long_factor, ROPE_SHORT: rope.short_factor}
        return {name: np.array(factors, np.float32) for name, factors in pair.items()}
    return {}


def specs_of(shapes: Mapping[str, tuple[int, ...]], kind: str) -> tuple[dict[str, Spec], list[str]]:
    """The format of every tensor as llama.cpp chooses it, and what is to be said about it.

    Norms and vectors stay F32; a row that is no whole number of blocks becomes F16. With q4_0,
    embeddings and head are Q8_0: llama.cpp takes Q6_K there, which is not written here.

    Args:
      shapes: tensor name -> shape, rows first.
      kind: f32, f16, bf16, q8_0 or q4_0.
    """
    specs = {name: (format_of(name, shape, kind), shape) for name, shape in shapes.items()}
    notes = []
    values = BY_NAME[kind.upper()][1].values
    if odd := [name for name, shape in shapes.items() if len(shape) > 1 and shape[-1] % values]:
        notes.append(f"rows are no multiple of {values}, so these are F16: {listed(odd)}")
    if kind == "q4_0" and any(specs[name][0] == "Q8_0" for name in specs):
        notes.append("embeddings and head are Q8_0, since Q4_0 costs most there")
    return specs, notes


def format_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The format of one tensor."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "F32"
    if kind == "q4_0" and name in EMBEDDINGS_AND_HEAD:
        kind = "q8_0"
    return "F16" if shape[-1] % BY_NAME[kind.upper()][1].values else kind.upper()

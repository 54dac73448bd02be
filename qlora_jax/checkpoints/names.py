"""Hugging Face's names to stacked names and layers, and back: unknown, missing, doubled are errors.

model.layers.3.self_attn.q_proj.weight  <->  model.layers.self_attn.q_proj.weight, layer 3
model.norm.weight                       <->  model.norm.weight, no layer
"""

import re
from collections.abc import Iterable, Mapping

from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.weight_names import HEAD, LAYERS

NUMBERED = re.compile(r"model\.layers\.(\d{1,9})\.(.+)", re.ASCII)
# Buffers that old checkpoints carry and config.json gives: never read.
HARMLESS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.masked_bias)")


def split(name: str) -> tuple[str, int | None]:
    """(stacked name, layer) of a Hugging Face name; the layer is None outside the layers."""
    match = NUMBERED.fullmatch(name)
    return (LAYERS + match[2], int(match[1])) if match else (name, None)


def join(stacked: str, layer: int | None) -> str:
    """The Hugging Face name; `split` undone."""
    if layer is None:
        return stacked
    return f"{LAYERS}{layer}.{stacked.removeprefix(LAYERS)}"


def layer_names(stacked: str, layers: int) -> list[str]:
    """The Hugging Face names of a stacked weight, layer by layer: one if it has no layers."""
    if not stacked.startswith(LAYERS):
        return [stacked]
    return [join(stacked, layer) for layer in range(layers)]


def hugging_face_names(stacked: Iterable[str], layers: int) -> dict[str, str]:
    """Hugging Face name -> stacked name of every weight; all of one layer, then the next layer."""
    stacked = list(stacked)
    inner = [name for name in stacked if name.startswith(LAYERS)]
    names: dict[str, str] = {}
    for name in stacked:
        if name not in inner:
            names[name] = name
        elif name == inner[0]:
            names |= {join(part, layer): part for layer in range(layers) for part in inner}
    return names


def name_table(
    found: Iterable[str], expected: Mapping[str, tuple[int, ...]], layers: int, where: str
) -> dict[str, list[str]]:
    """For each expected stacked name, the source's name of every layer.

    `lm_head.weight` in a source whose embeddings are tied is tolerated: the reader compares.

    Raises:
      InputError: W-DOUBLE, W-UNKNOWN (with the nearest names), W-MISSING (all, up to ten listed).
    """
    by_place: dict[tuple[str, int | None], str] = {}
    for name in found:
        place = split(name)
        if place in by_place:
            both = f"{by_place[place]!r} and {name!r} name the same weight"
            raise InputError("W-DOUBLE", where, f"doubled: {both}", "each weight once")
        by_place[place] = name
    wanted = {split(name): name for s in expected for name in layer_names(s, layers)}
    unknown = [
        name
        for place, name in by_place.items()
        if place not in wanted and name != HEAD and not HARMLESS.fullmatch(name)
    ]
    missing = [name for place, name in wanted.items() if place not in by_place]
    if unknown:
        raise unknown_error(unknown, missing, list(wanted.values()), layers, where)
    if missing:
        found_text = f"missing weights: {listed(missing)}"
        hint = "tie_word_embeddings true in config.json, if the model ties them"
        hint = hint if missing == [HEAD] else "download the whole model again"
        raise InputError("W-MISSING", where, found_text, hint=hint)
    return {s: [by_place[split(n)] for n in layer_names(s, layers)] for s in expected}


def unknown_error(
    unknown: list[str], missing: list[str], wanted: list[str], layers: int, where: str
) -> InputError:
    """The error for names that the model does not have."""
    first = unknown[0]
    layer = split(first)[1]
    if layer is not None and layer >= layers:
        expected = f"layers 0 to {layers - 1}, as config.json's num_hidden_layers says"
        return InputError("W-UNKNOWN", where, f"unknown weights: {listed(unknown)}", expected)
    close = nearest(first, (missing or wanted)[:2000])
    hint = f"a model of this architecture; the nearest name is {close[0]}" if close else ""
    return InputError("W-UNKNOWN", where, f"unknown weights: {listed(unknown)}", hint=hint)

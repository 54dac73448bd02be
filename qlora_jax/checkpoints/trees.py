"""A pytree as a plain description and its leaves by path, and back.

    {"q_proj": {"A": a, "B": b}, "step": 3}
    leaves       q_proj/A: a     q_proj/B: b     step: 3
    description  {"dict": [["q_proj", {"dict": [["A", {"leaf": "q_proj/A"}], ...

Dicts, lists, tuples, None and the classes of `KNOWN` are built again from the description alone.
Any other node, an optimizer's state say, comes back as itself only from an example of it, else as a
dict.
"""

import dataclasses
from typing import Any

import jax

from pallas_kernels.quantize.api import DoubleQuantized
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.errors import InputError, listed
from qlora_jax.quantization.tensor import QuantizedTensor

KNOWN = {cls.__name__: cls for cls in (Adapter, LoraSpec, QuantizedTensor, DoubleQuantized)}


def describe(tree: Any, path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(description, leaves by path) of a pytree; the leaves are in the order of `jax.tree.leaves`.

    Raises:
      InputError: two leaves have the same path, or a key is neither text nor a whole number.
    """
    if tree is None:
        return {"none": True}, {}
    flat = jax.tree_util.default_registry.flatten_one_level_with_keys(tree)
    if flat is None:
        path = path or "leaf"
        return {"leaf": path}, {path: tree}
    items, leaves = [], {}
    for entry, child in flat[0]:
        key = key_of(entry, path)
        inner, found = describe(child, f"{path}/{key}" if path else str(key))
        if doubled := leaves.keys() & found.keys():
            raise InputError("ORB-NAME", listed(sorted(doubled)), "two leaves have this path")
        leaves |= found
        items.append([key, inner])
    return node(tree, items), leaves


def key_of(entry: Any, path: str) -> str | int:
    """The dict key, index or field name of one child."""
    for field in ("key", "idx", "name"):
        if isinstance(key := getattr(entry, field, None), str | int):
            return key
    raise InputError("ORB-NAME", path or "tree", f"key {entry}", "text or a whole number")


def node(tree: Any, items: list) -> dict[str, Any]:
    """The description of a node whose children are described."""
    if type(tree) in (dict, list, tuple):
        return {type(tree).__name__: items}
    name = type(tree).__name__
    described = {"class": name, "items": items}
    if KNOWN.get(name) is type(tree) and dataclasses.is_dataclass(tree):
        children = {key for key, _ in items}
        fields = [field.name for field in dataclasses.fields(tree) if field.name not in children]
        described["static"] = {field: pack(getattr(tree, field)) for field in fields}
    return described


def rebuild(description: dict[str, Any], leaves: dict[str, Any]) -> Any:
    """The tree of a description; nodes of unknown classes become dicts of their children."""
    if "leaf" in description:
        return leaves[description["leaf"]]
    if "none" in description:
        return None
    (items,) = (
        description[kind] for kind in ("dict", "list", "tuple", "items") if kind in description
    )
    built = {key: rebuild(inner, leaves) for key, inner in items}
    if "list" in description or "tuple" in description:
        return (list if "list" in description else tuple)(built.values())
    if cls := KNOWN.get(description.get("class")):
        static = {key: unpack(value) for key, value in description.get("static", {}).items()}
        if cls is Adapter and not isinstance(static["spec"], LoraSpec):
            raise TypeError("an adapter without a LoraSpec")
        return cls(**built, **static)
    return built


def pack(value: Any) -> Any:
    """A static field as JSON that `unpack` undoes: tuples and specs are marked."""
    if isinstance(value, tuple):
        return {"tuple": [pack(item) for item in value]}
    if isinstance(value, LoraSpec):
        fields = [field.name for field in dataclasses.fields(value)]
        return {"LoraSpec": {field: pack(getattr(value, field)) for field in fields}}
    return value


def unpack(value: Any) -> Any:
    """`pack` undone."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(unpack(item) for item in inner)
    return LoraSpec(**{field: unpack(item) for field, item in inner.items()})


def difference(saved: dict[str, Any], wanted: dict[str, Any], path: str = "") -> str:
    """The first place where two descriptions differ, with both values; empty if nowhere."""
    where = path or "the tree"
    kinds = [next(iter(saved)), next(iter(wanted))]
    names = [saved.get("class", kinds[0]), wanted.get("class", kinds[1])]
    if names[0] != names[1]:
        return f"{where} is saved as {names[0]}, asked for as {names[1]}"
    if kinds[0] in ("leaf", "none"):
        return ""
    kind = "items" if "items" in saved else kinds[0]
    ours, theirs = dict(saved[kind]), dict(wanted[kind])
    if missing := [key for key in theirs if key not in ours]:
        return f"{where} has no {listed(map(str, missing))}"
    if more := [key for key in ours if key not in theirs]:
        return f"{where} has {listed(map(str, more))}, which was not asked for"
    for key, value in wanted.get("static", {}).items():
        if (old := unpack(saved["static"][key])) != (new := unpack(value)):
            return f"{where}: {key} is saved as {old}, asked for as {new}"
    inside = (difference(ours[k], theirs[k], f"{path}/{k}" if path else str(k)) for k in ours)
    return next(filter(None, inside), "")

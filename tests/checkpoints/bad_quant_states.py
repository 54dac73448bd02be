"""4-bit checkpoints with one thing wrong: the edit, the error's code, words of its message."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.shards import SINGLE
from tests.golden_data import golden_folder

NAME = "model.layers.1.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def as_bytes(fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8).copy()


def state(tensors, **changes):
    """Changes fields of the JSON; None takes one out."""
    fields = json.loads(tensors[STATE].tobytes()) | changes
    tensors[STATE] = as_bytes({k: v for k, v in fields.items() if v is not None})


def replace(key, change):
    return lambda t: t.update({key: change(t[key])})


def take_out(key):
    return lambda t: t.pop(key)


def rename(old, new):
    return lambda t: t.update({new: t.pop(old)})


def with_state(**changes):
    return lambda t: state(t, **changes)


def stored_as(codes, dtype):
    return codes.reshape(-1).view(dtype).reshape(-1, 1)


def packed_embeddings(tensors):
    """Gives the embeddings (256, 64) what a 4-bit weight of another shape has, fitted."""
    name = "model.embed_tokens.weight"
    n = tensors[name].size
    fields = json.loads(tensors[STATE].tobytes()) | {"shape": [256, 64]}
    tensors[name] = np.zeros((n // 2, 1), np.uint8)
    tensors[f"{name}.absmax"] = np.zeros(n // 64, np.uint8)
    tensors[f"{name}.nested_absmax"] = np.ones(1, np.float32)
    tensors[STATE.replace(NAME, name)] = as_bytes(fields)
    for table in ("quant_map", "nested_quant_map"):
        tensors[f"{name}.{table}"] = tensors[f"{NAME}.{table}"].copy()


BAD = {
    "embeddings": (packed_embeddings, "W4-MIXED", "embed_tokens.weight: is 4-bit"),
    "weight missing": (take_out(NAME), "W4-KEYS", "missing weight beside absmax"),
    "absmax missing": (take_out(f"{NAME}.absmax"), "W4-KEYS", "missing absmax"),
    "map missing": (take_out(f"{NAME}.quant_map"), "W4-KEYS", "missing quant_map"),
    "nested missing": (take_out(f"{NAME}.nested_absmax"), "W4-KEYS", "missing nested_absmax"),
    "nested map missing": (
        take_out(f"{NAME}.nested_quant_map"),
        "W4-KEYS",
        "missing nested_quant_map",
    ),
    "state missing": (take_out(STATE), "W4-KEYS", "missing quant_state"),
    "state doubled": (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].copy()}),
        "W4-KEYS",
        "doubled quant_state",
    ),
    "key unknown": (
        lambda t: t.update({f"{NAME}.scb": np.zeros(1, np.float32)}),
        "W-UNKNOWN",
        f"{NAME}.scb",
    ),
    "kind unknown": (rename(STATE, STATE.replace("nf4", "nf5")), "W4-KIND", "bitsandbytes__nf5"),
    "kind other": (with_state(quant_type="fp4"), "W4-STATE", "quant_type is 'fp4'"),
    "kind no text": (with_state(quant_type=[4]), "W4-STATE", "quant_type is [4]"),
    "block missing": (with_state(blocksize=None), "W4-STATE", "blocksize is 'missing'"),
    "block odd": (with_state(blocksize=48), "W4-STATE", "blocksize is 48"),
    "block float": (with_state(blocksize=64.0), "W4-STATE", "blocksize is 64.0"),
    "block other": (with_state(blocksize=128), "W4-SHAPE", "absmax is uint8 of shape (128,)"),
    "dtype": (with_state(dtype="float8"), "W4-STATE", "dtype is 'float8'"),
    "shape missing": (with_state(shape=None), "W4-STATE", "shape is 'missing'"),
    "shape rank": (with_state(shape=[8192]), "W4-STATE", "shape is [8192]"),
    "shape zero": (with_state(shape=[0, 64]), "W4-STATE", "shape is [0, 64]"),
    "shape huge": (with_state(shape=[10**400, 64]), "W4-STATE", "shape is [1000"),
    "shape other": (with_state(shape=[64, 64]), "W4-SHAPE", "weight is uint8 of shape (4096, 1)"),
    "shape turned": (with_state(shape=[64, 128]), "W-SHAPE", "has the shape (64, 128)"),
    "offset missing": (with_state(nested_offset=None), "W4-STATE", "nested_offset is 'missing'"),
    "offset text": (with_state(nested_offset="1"), "W4-STATE", "nested_offset is '1'"),
    "offset large": (with_state(nested_offset=1e300), "W4-STATE", "nested_offset is 1e+300"),
    "nested block": (with_state(nested_blocksize=64), "W4-STATE", "nested_blocksize is 64"),
    "nested dtype": (with_state(nested_dtype="float16"), "W4-STATE", "nested_dtype is 'float16'"),
    "field unknown": (with_state(axis=1), "W4-STATE", "unknown axis"),
    "state NaN": (with_state(nested_offset=float("nan")), "JSON-NUMBER", "NaN"),
    "state no JSON": (replace(STATE, lambda s: s[:-1].copy()), "JSON-SYNTAX", NAME),
    "state floats": (replace(STATE, lambda s: s.astype(np.float32)), "W4-SHAPE", "is float32"),
    "not nested": (
        with_state(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        "W4-KEYS",
        "unknown nested_absmax, nested_quant_map",
    ),
    "absmax floats": (
        replace(f"{NAME}.absmax", lambda a: a.astype(np.float32)),
        "W4-SHAPE",
        "absmax is float32",
    ),
    "codes cut": (replace(NAME, lambda c: c[:-1].copy()), "W4-SHAPE", "of shape (4095, 1)"),
    "codes of 16 bits": (
        replace(NAME, lambda c: stored_as(c, np.int16)),
        "W4-SHAPE",
        "weight is int16 of shape (2048, 1) (expected uint8 of shape (4096, 1), or its bytes as",
    ),
    "codes cut in another storage": (
        replace(NAME, lambda c: stored_as(c, np.float32)[:-1].copy()),
        "W4-SHAPE",
        "weight is float32 of shape (1023, 1)",
    ),
    "absmax cut": (
        replace(f"{NAME}.absmax", lambda a: a[:-1].copy()),
        "W4-SHAPE",
        "absmax is uint8 of shape (127,)",
    ),
    "absmax turned": (
        replace(f"{NAME}.absmax", lambda a: a.reshape(1, -1)),
        "W4-SHAPE",
        "absmax is uint8 of shape (1, 128)",
    ),
    "nested cut": (
        replace(f"{NAME}.nested_absmax", lambda a: a[:-1].copy()),
        "W4-SHAPE",
        "nested_absmax is float32 of shape (0,)",
    ),
    "nested halves": (
        replace(f"{NAME}.nested_absmax", lambda a: a.astype(np.float16)),
        "W4-SHAPE",
        "nested_absmax is float16",
    ),
    "map cut": (
        replace(f"{NAME}.quant_map", lambda m: m[:-1].copy()),
        "W4-SHAPE",
        "quant_map is float32 of shape (15,)",
    ),
    "map doubles": (
        replace(f"{NAME}.quant_map", lambda m: m.astype(np.float64)),
        "W4-SHAPE",
        "quant_map is float64",
    ),
    "nested map cut": (
        replace(f"{NAME}.nested_quant_map", lambda m: m[:-1].copy()),
        "W4-SHAPE",
        "nested_quant_map is float32 of shape (255,)",
    ),
    "state empty": (replace(STATE, lambda s: s[:0].copy()), "W4-SHAPE", "of shape (0,)"),
    "codes turned": (replace(NAME, lambda c: c.reshape(1, -1)), "W4-SHAPE", "of shape (1, 4096)"),
    "map other": (
        replace(f"{NAME}.quant_map", lambda m: m[::-1].copy()),
        "W4-MAP",
        "not the table of nf4",
    ),
    "map NaN": (replace(f"{NAME}.quant_map", lambda m: m * np.float32(np.nan)), "W4-MAP", "nf4"),
    "nested map other": (
        replace(f"{NAME}.nested_quant_map", lambda m: m * np.float32(0.9)),
        "W4-MAP",
        "nested_quant_map",
    ),
    "nested overflow": (
        lambda tensors: (
            with_state(nested_offset=3e38)(tensors),
            replace(f"{NAME}.nested_absmax", lambda a: a * 0 - np.float32(3e38))(tensors),
        ),
        "W-FINITE",
        f"{NAME}.nested_absmax: is not finite: inf at index (0,)",
    ),
    "nested NaN": (
        replace(f"{NAME}.nested_absmax", lambda a: a * np.float32(np.nan)),
        "W-FINITE",
        f"{NAME}.nested_absmax: is not finite: nan at index (0,)",
    ),
    "norm Inf": (
        replace("model.norm.weight", lambda a: a * np.float32(np.inf)),
        "W-FINITE",
        "model.norm.weight",
    ),
    "one layer dense": (
        lambda t: (
            [t.pop(key) for key in list(t) if key.startswith(f"{NAME}.")]
            and t.update({NAME: np.zeros((128, 64), np.float32)})
        ),
        "W4-MIXED",
        "layers differ",
    ),
}


def edited(tmp_path, edit):
    """A copy of the golden checkpoint with its tensors edited."""
    folder = tmp_path / "model"
    shutil.copytree(golden_folder("bnb_state") / "checkpoint", folder)
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)
    return folder

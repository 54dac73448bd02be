"""R24: a small file that claims or unfolds to much costs neither time nor memory."""

import json
import struct
import zlib

import pytest

from tests.checkpoints.gguf_files import ARRAY, text
from tests.checkpoints.safetensors_files import entry, safetensors_bytes
from tests.checkpoints.torch_writer import members_of, pickle_of, storage, tensor, zip_of
from tests.reliability import clean

RULE = "R24"
SECONDS, GROWTH = 2.0, 128 << 20
DEEP = b"[" * 100_000 + b"]" * 100_000
WEIGHTS = "model.safetensors"


def million_tensors() -> bytes:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return safetensors_bytes(b"{" + b",".join(one % i for i in range(1_000_000)) + b"}")


def stride_0() -> bytes:
    item = tensor(storage("Float", "0", 1), 0, (1 << 20, 1 << 20), (0, 0))
    return zip_of(members_of(pickle_of({"a": item}), {"0": bytes(4)}))


def many_references(depth: int = 40) -> bytes:
    """Each list holds the one before twice: 2^40 items."""
    nested = b"]q\x00"
    for level in range(1, depth):
        nested += b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 2 + b"e"
    return zip_of(members_of(b"\x80\x02" + nested + b".", {}))


def deflated() -> bytes:
    """A member of 1:1000."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    small = packer.compress(bytes(200 << 20)) + packer.flush()
    members = members_of(pickle_of({}), {"0": small})
    members[2].method, members[2].size = 8, 200 << 20
    return zip_of(members)


def gguf_array(element: int, count: int) -> bytes:
    head = b"GGUF" + struct.pack("<Iqq", 3, 0, 1)
    return head + text("a") + struct.pack("<IIQ", ARRAY, element, count)


def gguf_nested(depth: int) -> bytes:
    head = b"GGUF" + struct.pack("<Iqq", 3, 0, 1) + text("a") + struct.pack("<I", ARRAY)
    return head + struct.pack("<IQ", ARRAY, 1) * depth


def config(**changes) -> bytes:
    return json.dumps({"model_type": "llama", **clean.CONFIG, **changes}).encode()


def tokenizer(**changes) -> bytes:
    """tokenizer.json with parts replaced, its model's vocabulary or its own."""
    document = clean.tokenizer_json()
    for key, value in changes.items():
        (document["model"] if key in document["model"] else document)[key] = value
    return json.dumps(document).encode()


PADDING = {
    "strategy": {"Fixed": 1 << 28},
    **{"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0},
    "pad_token": "<s>",
}
BOMBS = {
    "deep config": ("weights", "config.json", lambda: b'{"a":' + DEEP + b"}"),
    "deep header": ("weights", WEIGHTS, lambda: safetensors_bytes(b'{"a":' + DEEP + b"}")),
    "deep index": ("shards", "model.safetensors.index.json", lambda: b'{"a":' + DEEP + b"}"),
    "deep adapter": ("adapter", "adapter_config.json", lambda: b'{"a":' + DEEP + b"}"),
    "deep tokenizer": ("tokenizer", "tokenizer.json", lambda: b'{"a":' + DEEP + b"}"),
    "header of 101 MB": (
        "weights",
        WEIGHTS,
        lambda: safetensors_bytes(b'{"a":"' + b" " * 101_000_000 + b'"}'),
    ),
    "header of 2^63": ("weights", WEIGHTS, lambda: struct.pack("<Q", 1 << 63) + b"{}" * 99),
    "million tensors": ("weights", WEIGHTS, million_tensors),
    "shape 2^62": (
        "weights",
        WEIGHTS,
        lambda: safetensors_bytes({"a": entry(shape=[2**31, 2**31])}, bytes(8)),
    ),
    "5000 digits": ("weights", "config.json", lambda: b'{"vocab_size":' + b"9" * 5000 + b"}"),
    "5000 digits in a header": (
        "weights",
        WEIGHTS,
        lambda: safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"),
    ),
    "2^31 layers": ("weights", "config.json", lambda: config(num_hidden_layers=2**31 - 1)),
    "10^7 layers": ("weights", "config.json", lambda: config(num_hidden_layers=10**7)),
    "wide": ("weights", "config.json", lambda: config(hidden_size=2**31 - 2)),
    "index of 100 MB": ("shards", "model.safetensors.index.json", lambda: b" " * 100_000_000),
    "rank 4096": (
        "adapter",
        "adapter_config.json",
        lambda: json.dumps(clean.ADAPTER | {"r": 4096, "rank_pattern": {}}).encode(),
    ),
    "slow pattern": (
        "adapter",
        "adapter_config.json",
        lambda: json.dumps(clean.ADAPTER | {"target_modules": "(.+)+(.+)+(.+)+(.+)+x"}).encode(),
    ),
    "deflated": ("bin", "pytorch_model.bin", deflated),
    "stride 0": ("bin", "pytorch_model.bin", stride_0),
    "2^40 items": ("bin", "pytorch_model.bin", many_references),
    "GGUF array of 2^63": ("gguf", "model.gguf", lambda: gguf_array(0, 1 << 63)),
    "GGUF array of 2^30": ("gguf", "model.gguf", lambda: gguf_array(8, 1 << 30)),
    "GGUF nested": ("gguf", "model.gguf", lambda: gguf_nested(100_000)),
    "GGUF tensors": (
        "gguf",
        "model.gguf",
        lambda: b"GGUF" + struct.pack("<Iqq", 3, (1 << 63) - 1, (1 << 63) - 1),
    ),
    "token id 2^32 - 1": (
        "tokenizer",
        "tokenizer.json",
        lambda: tokenizer(vocab={"a": 0, "b": 2**32 - 1}, merges=[]),
    ),
    "padding 2^28": ("tokenizer", "tokenizer.json", lambda: tokenizer(padding=PADDING)),
    "tokenizer of 100 MB": ("tokenizer", "tokenizer.json", lambda: b" " * 100_000_000),
}
HOMES = {
    "weights": ("weights", clean.model),
    "shards": ("weights", clean.sharded),
    "bin": ("weights", clean.torch_model),
    "gguf": ("weights", clean.gguf_model),
    "adapter": ("adapter", clean.adapter),
    "tokenizer": ("tokenizer", clean.tokenizer),
}
HARMLESS = {"padding 2^28"}  # padding is switched off, so that the rest is a good file


@pytest.mark.parametrize("home", HOMES)
def test_bombs(home, tmp_path, worker_of, record_property):
    loader, write = HOMES[home]
    folder, pristine = write(tmp_path / "case"), write(tmp_path / "clean")
    cases = {name: case[1:] for name, case in BOMBS.items() if case[0] == home}
    wrong, reports = [], []
    worker = worker_of(loader)
    reference = worker.learn(pristine)
    for name, (file, build) in cases.items():
        (folder / file).write_bytes(build())
        report = worker.load(folder)
        (folder / file).write_bytes((pristine / file).read_bytes())
        reports.append(report)
        expected = "loaded" if name in HARMLESS else "refused"
        if (
            report.outcome != expected
            or report.seconds > SECONDS
            or report.grown > reference.grown + GROWTH
        ):
            wrong.append((name, report))
    record_property("cases", len(cases))
    record_property("passed", len(cases) - len(wrong))
    record_property("slowest_seconds", max(report.seconds for report in reports))
    record_property("largest_rss_growth_bytes", max(report.grown for report in reports))
    assert wrong == []

"""R20: a damaged file loads as the clean one does, or is refused by an error of ours, always.

What is asked of every file: the outcome is one of the two, an error ends the program with 2 or 5,
nothing takes 2 s, memory grows by at most 64 MiB more than for the clean file, and nothing outside
the folder is opened.

What "loads as the clean one does" can mean depends on the format. Orbax trees have digests and .bin
files have CRCs: every number must be the clean one. safetensors and GGUF have no checksum: a bit
flipped within a weight makes another good file, so such a mutation says how many numbers it may
change, and no other may differ; damage to the structure may change none. Two tensors of one shape
that trade places in a header make another good file too, and are not among the mutations. A JSON
file's value may be another good value (a norm's epsilon, an adapter's alpha): then what was read
must be what the file says, and the weights must be the clean ones.
"""

import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.reliability import clean, mutations
from tests.reliability.json_mutations import json_file, json_tree
from tests.reliability.worker import Report, Worker

RULE = "R20"
SLOW, GROWTH = 2.0, 64 << 20
CONFIG_KEYS = (
    "rope_scaling", "rope_parameters", "auto_map", "quantization_config", "partial_rotary_factor",
    "trust_remote_code", "attn_logit_softcapping", "sliding_window", "layer_types", "rope_theta",
)  # fmt: skip
ADAPTER_KEYS = ("auto_mapping", "megatron_config", "layer_replication", "layers_to_transform", "x")
TOKENIZER_KEYS = (
    "auto_map", "tokenizer_file", "vocab_file", "added_tokens_decoder", "pad_token", "name_or_path",
    "extra_special_tokens", "additional_special_tokens", "padding_side", "chat_template",
)  # fmt: skip


class Kind:
    """A kind of damaged file.

    Args:
      loader: of loaders.py.
      write: makes the clean folder.
      files: what is damaged, one of them a case.
      mutate: (bytes, generator) -> (bytes, numbers that may change).
    """

    def __init__(self, loader, write, files, mutate):
        self.loader, self.write, self.files, self.mutate = loader, write, files, mutate


def config_json(data: bytes, rng: Random):
    return json_file(data, rng, CONFIG_KEYS)


def quantization_config(data: bytes, rng: Random):
    """Only that part of a config.json."""
    config = json.loads(data)
    part = {"quantization_config": config.pop("quantization_config")}
    spoiled = json_tree(part, rng, ("quant_method", "load_in_8bit"))
    return json.dumps(config).encode()[:-1] + b", " + spoiled.lstrip(b"{"), 0


KINDS = {
    "safetensors": Kind("weights", clean.model, ["model.safetensors"], mutations.safetensors),
    "safetensors-4bit": Kind(
        "weights", clean.bitsandbytes, ["model.safetensors"], mutations.safetensors
    ),
    "safetensors-adapter": Kind(
        "adapter", clean.adapter, ["adapter_model.safetensors"], mutations.safetensors
    ),
    "gguf": Kind(
        "weights",
        clean.gguf_model,
        ["model.gguf"],
        lambda data, rng: mutations.gguf(clean.gguf_parts, rng),
    ),
    "gguf-k": Kind(
        "weights",
        lambda folder: clean.gguf_model(folder, clean.gguf_k_parts),
        ["model.gguf"],
        lambda data, rng: mutations.gguf(clean.gguf_k_parts, rng, block=256),
    ),
    "bin": Kind(
        "weights",
        clean.torch_model,
        ["pytorch_model.bin"],
        lambda data, rng: mutations.torch(clean.torch_members, rng),
    ),
    **{
        f"json-config-{family}": Kind(
            "weights",
            lambda folder, family=family: clean.model(folder, family),
            ["config.json"],
            config_json,
        )
        for family in clean.FAMILIES
    },
    "json-index": Kind("weights", clean.sharded, ["model.safetensors.index.json"], json_file),
    "json-adapter": Kind(
        "adapter",
        clean.adapter,
        ["adapter_config.json"],
        lambda data, rng: json_file(data, rng, ADAPTER_KEYS),
    ),
    "json-tokenizer": Kind(
        "tokenizer",
        clean.tokenizer,
        ["tokenizer_config.json"],
        lambda data, rng: json_file(data, rng, TOKENIZER_KEYS),
    ),
    "json-quant": Kind("weights", clean.bitsandbytes, ["config.json"], quantization_config),
    "orbax": Kind("orbax", clean.orbax, None, mutations.anything),
}
# How many of each: (in `make test`, in `make test-reliability`).
COUNTS = {
    "safetensors-4bit": (25, 400),
    "safetensors-adapter": (25, 400),
    "safetensors": (80, 1200),
    "gguf": (100, 1500),
    "gguf-k": (30, 500),
    "bin": (65, 1000),
    "json-config": (10, 120),  # each family
    "json-index": (20, 300),
    "json-adapter": (20, 300),
    "json-tokenizer": (15, 260),
    "json-quant": (15, 300),
    "orbax": (35, 500),
}
# Seeds that once found something, beyond those of the quick tier.
REGRESSIONS: dict[str, tuple[int, ...]] = {"gguf": (137, 227), "json-tokenizer": (74,)}


def counts(kind: str) -> tuple[int, int]:
    """How many cases of a kind the two tiers have."""
    return COUNTS["json-config" if kind.startswith("json-config") else kind]


def problem(report: Report, reference: Report, may_change: int, said: dict) -> str:
    """What is wrong with the outcome of one case; empty if nothing is."""
    if report.outcome not in ("loaded", "refused"):
        return f"{report.outcome}: {report.code} {report.text}"
    if report.outcome == "refused" and report.exit_code not in (2, 5):
        return f"exit code {report.exit_code}: {report.text}"
    if report.outcome == "refused" and not report.text.isprintable():
        return f"more than one printable line: {report.text!r}"
    if report.seconds > SLOW:
        return f"took {report.seconds:.1f} s"
    if report.grown > reference.grown + GROWTH:
        return f"memory grew by {report.grown >> 20} MiB"
    if report.outside:
        return f"reached outside the folder: {report.outside}"
    if report.outcome == "loaded":
        return difference(report, reference, may_change, said)
    return ""


def difference(report: Report, reference: Report, may_change: int, said: dict) -> str:
    """How what was loaded differs from the clean file's, beyond what may."""
    found, wanted = dict(report.values), dict(reference.values)
    read, before = found.pop("config", {}), wanted.pop("config", {})
    for key in said.keys() & read.keys():
        if read[key] != before[key] and read[key] != plain(said[key]):
            return f"{key} is {said[key]!r:.99} in the file, was read as {read[key]!r:.99}"
    if found.keys() != wanted.keys():
        return f"other leaves: {sorted(found.keys() ^ wanted.keys())[:5]}"
    changed = 0
    for name, values in wanted.items():
        other = found[name]
        if (values.shape, values.dtype) != (other.shape, other.dtype):
            return f"{name}: {other.dtype} {other.shape} instead of {values.dtype} {values.shape}"
        width = max(values.dtype.itemsize, 1)
        pair = [np.frombuffer(a.tobytes(), np.uint8).reshape(-1, width) for a in (values, other)]
        changed += int((pair[0] != pair[1]).any(axis=1).sum())
    return f"{changed} numbers differ, {may_change} may" if changed > may_change else ""


def plain(said):
    """A JSON value as a configuration keeps it."""
    return tuple(said) if isinstance(said, list) else said


def run(name: str, seeds, folder: Path, worker: Worker, record_property) -> list[str]:
    """The failures among the cases of one kind; each case is its kind and its seed."""
    kind, failures, slowest, largest, outcomes = KINDS[name], [], 0.0, 0, {}
    folder, pristine = kind.write(folder / "case"), folder / "clean"
    shutil.copytree(folder, pristine)
    files = kind.files or sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )
    reference = worker.learn(pristine)
    for seed in seeds:
        rng = Random(f"{name} {seed}")
        path = folder / rng.choice(files)
        whole = path.read_bytes()
        spoiled, may_change = kind.mutate(whole, rng)
        path.write_bytes(spoiled)
        report = worker.load(folder)
        said = said_by(spoiled) if path.suffix == ".json" else {}
        if found := problem(report, reference, may_change, said):
            failures.append(f"{name} {seed} ({path.name}): {found}")
        path.write_bytes(whole)
        slowest, largest = max(slowest, report.seconds), max(largest, report.grown)
        outcomes[report.outcome] = outcomes.get(report.outcome, 0) + 1
    record_property("cases", len(seeds))
    record_property("passed", len(seeds) - len(failures))
    record_property("slowest_seconds", slowest)
    record_property("largest_rss_growth_bytes", largest)
    record_property("outcomes", outcomes)
    return failures


def said_by(data: bytes) -> dict:
    """The object of a JSON file; empty if it is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_files(kind, tmp_path, worker_of, record_property):
    seeds, worker = quick_seeds(kind), worker_of(KINDS[kind].loader)
    assert run(kind, seeds, tmp_path, worker, record_property) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_damaged_files(kind, tmp_path, worker_of, record_property):
    quick, worker = quick_seeds(kind), worker_of(KINDS[kind].loader)
    seeds = [seed for seed in range(counts(kind)[1]) if seed not in quick]
    assert run(kind, seeds, tmp_path, worker, record_property) == []


def quick_seeds(kind: str) -> list[int]:
    return [*range(counts(kind)[0]), *REGRESSIONS.get(kind, ())]

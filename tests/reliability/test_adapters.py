"""R28: an adapter that is not what its config and base say is refused, in a line of its own."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.cli.main import main
from tests.reliability import clean

RULE = "R28"
MOST_LINES = 20
BASE, ADAPTER = "base", "adapter"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


def config(folder: Path, name: str, **changes) -> None:
    """Sets keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings(**changes) -> Callable[[Path], None]:
    """An adapter_config.json with other values."""
    return lambda folder: config(folder / ADAPTER, "adapter_config.json", **changes)


def tensors(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """An adapter with other tensors."""

    def change(folder: Path) -> None:
        path = folder / ADAPTER / "adapter_model.safetensors"
        arrays = load_file(path)
        edit(arrays)
        save_file(arrays, path)

    return change


def swapped(arrays: dict) -> None:
    for layer in range(clean.LAYERS):
        a, b = (Q0.replace("0", str(layer)) + f".lora_{kind}.weight" for kind in "AB")
        arrays[a], arrays[b] = arrays[b], arrays[a]


def infinite(arrays: dict) -> None:
    arrays[B0] = arrays[B0].copy()
    arrays[B0][3, 1] = -np.inf


def of_another_base(folder: Path) -> None:
    """qlora_jax.json as a run leaves it, with the fingerprint of other weights."""
    facts = {"base": "0" * 64, "dtype": "float32", "quantization": None}
    (folder / ADAPTER / "qlora_jax.json").write_text(json.dumps(facts))


def base_without_layer_1(folder: Path) -> None:
    config(folder / BASE, "config.json", num_hidden_layers=1)


def wider_base(folder: Path) -> None:
    config(folder / BASE, "config.json", hidden_size=64, intermediate_size=128)


CASES = {
    "no tensors": (tensors(dict.clear), "PEFT-MISSING", "missing tensors: .*lora_A.weight, .*B"),
    "a missing tensor": (tensors(lambda t: t.pop(B0)), "PEFT-MISSING", f"missing tensors: {B0}"),
    "an extra tensor": (
        tensors(lambda t: t.update(extra=np.ones(2, np.float32))),
        "PEFT-UNKNOWN",
        "unknown tensors: extra",
    ),
    "another rank": (settings(r=8), "PEFT-SHAPE", r"shape \(4, 32\) \(expected shape \(8, 32\)"),
    "one of another rank": (
        tensors(lambda t: t.update({A0: np.ones((3, 32), np.float32)})),
        "PEFT-SHAPE",
        r"shape \(3, 32\) \(expected shape \(4, 32\), \(r, in\)\)",
    ),
    "A and B swapped": (tensors(swapped), "PEFT-SHAPE", "Try: a file in which .* not swapped"),
    "integers": (
        tensors(lambda t: t.update({A0: np.ones((4, 32), np.int8)})),
        "PEFT-DTYPE",
        "is int8",
    ),
    "not finite": (tensors(infinite), "W-FINITE", r"-inf at index \(3, 1\)"),
    "other weights": (of_another_base, "PEFT-BASE", "was trained on another base: .*000000000000"),
    "a base with a layer less": (base_without_layer_1, "LORA-TARGETS", "'layers.1.mlp.down_proj'"),
    "a wider base": (wider_base, "PEFT-SHAPE", r"shape \(4, 32\) \(expected shape \(4, 64\)"),
    "DoRA without lengths": (
        settings(use_dora=True),
        "PEFT-MISSING",
        "missing tensors: .*q_proj.lora_magnitude_vector",
    ),
    "a pattern for nothing": (
        settings(rank_pattern={"v_proj": 2}),
        "LORA-TARGETS",
        "rank_pattern: 'v_proj' matches no target",
    ),
    "A and B for the head": (
        settings(target_modules=["q_proj", "lm_head"]),
        "LORA-TARGETS",
        r"lm_head has no A and B.*modules_to_save=\[lm_head\]",
    ),
    "a norm in full": (
        settings(modules_to_save=["norm"]),
        "LORA-MODULES",
        r"'norm' cannot be trained in full \(expected some of lm_head, embed_tokens\)",
    ),
    "biases": (settings(bias="lora_only"), "PEFT-UNSUPPORTED", "bias: 'lora_only'"),
    "transposed weights": (settings(fan_in_fan_out=True), "PEFT-UNSUPPORTED", "fan_in_fan_out"),
    "layers repeated": (
        settings(layer_replication=[[0, 2]]),
        "PEFT-UNSUPPORTED",
        "layer_replication",
    ),
    "trained tokens": (
        settings(trainable_token_indices=[1]),
        "PEFT-UNSUPPORTED",
        "trainable_token_indices",
    ),
    "an unknown key": (settings(use_dorra=True), "PEFT-UNKNOWN", "use_dorra: .*mean use_dora"),
}


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """What was said so far: no two errors are told alike."""
    return set()


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys, seen, case):
    damage, code, message = CASES[case]
    clean.model(tmp_path / BASE)
    clean.adapter(tmp_path / ADAPTER)
    damage(tmp_path)
    monkeypatch.chdir(tmp_path)
    if code == "PEFT-BASE":  # which only the weights can tell
        argv = ["merge", ADAPTER, "out", "--model", BASE, "--dtype", "float32"]
    else:
        argv = ["export", ADAPTER, "out", "--format", "peft", "--model", BASE]
    assert main(argv) == (3 if code == "PEFT-BASE" else 2)
    shown = capsys.readouterr()
    assert len((shown.out + shown.err).splitlines()) <= MOST_LINES
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error[")]
    assert line.startswith(f"error[{code}]: ")
    assert re.search(message, line), line
    assert line not in seen
    seen.add(line)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_named_is_not_compared(tmp_path, monkeypatch):
    clean.model(tmp_path / BASE)
    of_no_base = {"dtype": "float32", "quantization": None}
    (clean.adapter(tmp_path / ADAPTER) / "qlora_jax.json").write_text(json.dumps(of_no_base))
    monkeypatch.chdir(tmp_path)
    assert main(["merge", ADAPTER, "out", "--model", BASE]) == 0

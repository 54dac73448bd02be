"""`qlora-jax doctor`: a report that can be pasted, and an exit code when a kernel is wrong."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.cli import doctor
from qlora_jax.cli.main import main
from qlora_jax.workflows import environment, self_test

FOUND = {
    "python": "3.13.0",
    "platform": "Linux",
    "cpus": 16,
    "packages": {"jax": "0.12.0"},
    "backend": "gpu",
    "devices": [
        {
            "id": 0,
            "kind": "NVIDIA H100",
            "memories": ["device", "pinned_host"],
            "bytes_limit": 60_000_000_000,
            "bytes_in_use": 1_000_000_000,
            "peak_bytes_in_use": 2_000_000_000,
        }
    ],
    "gpu": {
        "driver": "580.10",
        "gpus": [{"name": "H100", "total_mib": "81559", "used_mib": "70000"}],
        "held_by": [{"pid": "77", "process": "python", "used_mib": "69000"}],
    },
    "memory": {"total": 64e9, "available": 32e9},
    "disk": {"total": 2e12, "free": 1e12},
    "variables": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    "kernels": [
        {"backend": "cpu", "layout": "", "error": None, "reason": "a GPU", "right": True},
        {"backend": "reference", "layout": "bnb", "error": 0.5, "reason": "", "right": False},
    ],
    "advice": [],
}


def test_json_has_everything(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == FOUND.keys()
    assert found["backend"] == "cpu"
    assert found["memory"]["available"] <= found["memory"]["total"]
    backends = {check["backend"]: check for check in found["kernels"]}
    for name in ("cpu", "reference"):
        assert backends[name]["right"]
        assert 0 < backends[name]["error"] <= self_test.ALLOWED


def test_text_shows_a_gpu_and_who_holds_it():
    shown = "\n".join(doctor.lines({**FOUND, "advice": list(doctor.advice(FOUND))}))
    assert "gpu        H100, 70000 of 81559 MiB used" in shown
    assert "held by    python (77): 69000 MiB" in shown
    assert "JAX may take 60.0 GB, holds 1.0 GB" in shown
    assert "variable   XLA_FLAGS=--xla_gpu_autotune_level=0" in shown
    assert "nf4_matmul cpu: not here: a GPU" in shown
    assert "nf4_matmul reference: WRONG" in shown
    assert "JAX takes 75% of a GPU's memory" in shown
    assert "please report" in shown


def test_a_gpu_that_jax_does_not_use_is_pointed_out():
    (text, *_) = doctor.advice({**FOUND, "backend": "cpu"})
    assert "pip install 'qlora-jax[cuda12]'" in text


def test_a_wrong_kernel_is_exit_code_1(monkeypatch, capsys):
    wrong = self_test.Check("cpu", "halves", error=float("inf"))
    monkeypatch.setattr(self_test, "kernel_test", lambda: [wrong])
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "right"), [(1.0, True), (1.02, False), (np.nan, False)])
def test_relative_error(value, right):
    error = self_test.relative(jnp.array([value, -1.0]), np.array([1.0, -1.0]))
    assert self_test.Check("cpu", "bnb", error=error).right == right
    assert dataclasses.replace(self_test.Check("cpu"), reason="elsewhere").right


def test_nvidia_smi_that_is_missing_or_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "NVIDIA_SMI", (str(tmp_path / "nvidia-smi"),))
    assert environment.nvidia() == {}
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$1" in *gpu=*) echo "H100, 580.10, 81559, 5";; '
        '*) echo "77, python, 4";; esac\n'
    )
    script.chmod(0o755)
    found = environment.nvidia()
    assert found["driver"] == "580.10"
    assert found["gpus"] == [{"name": "H100", "total_mib": "81559", "used_mib": "5"}]
    assert found["held_by"] == [{"pid": "77", "process": "python", "used_mib": "4"}]

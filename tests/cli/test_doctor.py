"""`qlora-jax doctor`: a report that can be pasted, and an exit code when a kernel is wrong."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.api import BACKENDS, GPU_BACKENDS
from qlora_jax.cli import doctor
from qlora_jax.cli.main import main
from qlora_jax.workflows import environment, self_test
from tests.pallas_kernels import mma_on_cpu
from tests.pallas_kernels.interpreted import interpreter


def made_up(backend, product, outcome, **rest):
    return dataclasses.asdict(self_test.Check(backend, product, outcome, **rest))


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
        made_up("small_m", "16 rows forward", "right", layout="bnb", error=0.001),
        made_up("small_m", "256 rows forward", "refused", reason="x has 256 rows"),
        made_up("small_m", "16 rows backward", "refused", reason="no backward"),
        made_up("small_m", "256 rows backward", "refused", reason="no backward"),
        made_up("ampere", "16 rows forward", "failed", reason="XlaRuntimeError: ptxas died"),
        made_up("ampere", "16 rows backward", "right", layout="bnb", error=0.002),
        made_up("ampere", "256 rows backward", "right", layout="bnb", error=0.003),
        made_up("cpu", "16 rows forward", "refused", reason="a GPU"),
        made_up("cpu", "16 rows backward", "refused", reason="a GPU"),
        made_up("reference", "16 rows forward", "wrong", layout="bnb", error=0.5),
    ],
    "advice": [],
}


def test_json_has_everything(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == FOUND.keys()
    assert found["backend"] == "cpu"
    assert found["memory"]["available"] <= found["memory"]["total"]
    products = {str(product) for product in self_test.PRODUCTS if not product.rank}
    for name in ("cpu", "reference"):
        checks = [check for check in found["kernels"] if check["backend"] == name]
        assert {check["product"] for check in checks} == products
        for check in checks:
            assert check["outcome"] == "right"
            assert 0 < check["error"] <= self_test.ALLOWED
    for check in found["kernels"]:
        if check["backend"] in GPU_BACKENDS:
            assert check["outcome"] == "refused"
            assert check["reason"] == "the default device is a cpu, not a GPU"
    assert {check["backend"] for check in found["kernels"]} == set(BACKENDS)


def test_text_shows_a_gpu_and_who_holds_it():
    shown = "\n".join(doctor.lines({**FOUND, "advice": list(doctor.advice(FOUND))}))
    assert "gpu        H100, 70000 of 81559 MiB used" in shown
    assert "held by    python (77): 69000 MiB" in shown
    assert "JAX may take 60.0 GB, holds 1.0 GB" in shown
    assert "variable   XLA_FLAGS=--xla_gpu_autotune_level=0" in shown
    assert (
        "kernel     nf4_matmul small_m: right 16 rows forward (bnb order, off by 1.0e-03 of the "
        "largest value)\n"
        "             not here for 256 rows forward: x has 256 rows\n"
        "             not here for 16, 256 rows backward: no backward\n"
        "kernel     nf4_matmul ampere: FAILED 16 rows forward: XlaRuntimeError: ptxas died\n"
        "             right 16, 256 rows backward (bnb order, off by 3.0e-03 of the largest "
        "value)\n"
        "kernel     nf4_matmul cpu: not here: a GPU\n"
        "kernel     nf4_matmul reference: WRONG (bnb order, off by 5.0e-01 of the largest value)\n"
    ) in shown
    assert "JAX takes 75% of a GPU's memory" in shown
    assert "please report" in shown


def test_a_gpu_that_jax_does_not_use_is_pointed_out():
    (text, *_) = doctor.advice({**FOUND, "backend": "cpu"})
    assert "pip install 'qlora-jax[cuda12]'" in text


@pytest.mark.parametrize("outcome", ["wrong", "failed"])
def test_a_wrong_kernel_is_exit_code_1(outcome, monkeypatch, capsys):
    bad = self_test.Check("cpu", "16 rows forward", outcome, "halves", error=float("inf"))
    monkeypatch.setattr(self_test, "kernel_test", lambda: [bad])
    assert main(["doctor"]) == 1
    assert outcome.upper() in capsys.readouterr().out


SMALL = self_test.Product(16, (64, 128), "forward")


def replaced(monkeypatch, function):
    """The only backend is `function`, called `made up`."""
    monkeypatch.setattr(self_test, "FORWARD", (("made up", function),))
    return self_test.check("made up", SMALL, *self_test.inputs(SMALL))


@pytest.mark.parametrize("factor", [1.0, 1.02, np.nan])
def test_what_is_off_is_wrong(factor, monkeypatch):
    found = replaced(monkeypatch, lambda x, w: reference.forward(x, w) * jnp.bfloat16(factor))
    assert found.outcome == ("right" if factor == 1 else "wrong")
    assert found.fine == (factor == 1)


def test_a_kernel_that_breaks_is_a_finding(monkeypatch):
    def broken(x, w):
        raise RuntimeError("ptxas exited\nwith code 255")

    found = replaced(monkeypatch, broken)
    assert found.outcome == "failed"
    assert found.reason == "RuntimeError: ptxas exited with code 255"
    assert not found.fine


def test_each_layout_is_offered(monkeypatch):
    def picky(x, w):
        if w.layout != "halves":
            raise Unsupported(f"layout is {w.layout}")
        return reference.forward(x, w)

    found = replaced(monkeypatch, picky)
    assert (found.outcome, found.layout) == ("right", "halves")


@pytest.mark.slow
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_kernels_pass_where_they_run(backend):
    """Interpreted: the adapter's term, both directions, few rows; what is refused has a reason."""
    mma_on_cpu.install()
    name = "b200" if backend == "blackwell" else "h100"
    products = [
        self_test.Product(rows, (128, 192), direction, rank)
        for rows, rank in ((16, 0), (16, 16))
        for direction in ("forward", "backward")
    ]
    with interpreter(name, sms=1):
        found = [self_test.check(backend, p, *self_test.inputs(p)) for p in products]
    assert all(check.fine for check in found)
    assert found[0].outcome == ("refused" if backend == "large_m" else "right")  # of 16 rows
    assert all(check.reason for check in found if check.outcome == "refused")


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

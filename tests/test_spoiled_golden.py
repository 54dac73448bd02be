"""One value of a golden array is changed, and a test of the suite must fail for it.

Each row: the file, the array, and a quick test that looks at it. Every folder of golden data has
a row; that every array of a file is looked at, GoldenFile itself sees to.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import golden_data
from tests.golden_data import GOLDEN, SELF_CONTAINED, spoil
from tests.tiers import tiered

ROOT = Path(__file__).parent.parent
MODELS = "tests/models/test_golden_models.py::test_golden_model"
TRAINING = "tests/train/test_golden_training.py::test_golden_training"
OPTIMIZERS = "tests/optim/test_paged_adamw.py::test_golden_optimizers"
WRITTEN = "tests/checkpoints/test_bnb4bit.py::test_golden_is_written_bit_for_bit"
PEFT = "tests/checkpoints/test_peft_golden.py::test_golden_adapter"
COMPOSED = "tests/adapters/test_compose_golden.py::test_golden_composition"
SMOLLM2 = "tests/evaluation/test_golden_smollm2.py"
KERNELS = "tests/pallas_kernels"
INIT = "tests/adapters/test_closer.py"

Q0 = "model.layers.0.self_attn.q_proj"
LORAPLUS = "tests/optim/test_loraplus.py::test_golden"

SPOILED = [
    ("adapters/io.npz", "rslora.logits", f"{PEFT}[rslora]"),
    ("adapters/io.npz", "dora.merged_logits", f"{PEFT}[dora]"),
    ("adapters/compositions.npz", "ties.logits", f"{COMPOSED}[ties]"),
    (
        "adapters/compositions.npz",
        "svd.delta.model.layers.1.mlp.down_proj",
        f"{COMPOSED}[svd]",
    ),
    (
        "bnb_state/checkpoint/model.safetensors",
        "model.layers.1.mlp.up_proj.weight.absmax",
        f"{WRITTEN}[source]",
    ),
    ("init/init.npz", f"pissa_rslora.delta.{Q0}", f"{INIT}::test_golden[pissa_rslora]"),
    ("init/init.npz", f"loftq5.base.{Q0}", f"{INIT}::test_golden[loftq5]"),
    ("init/init.npz", f"replaced.A_lengths.{Q0}", f"{INIT}::test_golden_of_a_base_as_it_is"),
    ("init/init.npz", "loraplus.after5.B", f"{LORAPLUS}[device-32]"),
    ("models/llama/io.npz", "logits", f"{MODELS}[llama]"),
    ("models/llama/io.npz", "greedy", f"{MODELS}[llama]"),
    ("models/llama_tied/model.safetensors", "model.norm.weight", f"{MODELS}[llama_tied]"),
    ("nf4/ramp.npz", "float32.nf4.64.dq.codes", f"{KERNELS}/test_quantize.py::test_golden[ramp]"),
    ("nf4/tables.npz", "fp4", f"{KERNELS}/test_codebooks.py::test_golden_tables"),
    ("smollm2/logits.npz", "values", f"{SMOLLM2}::test_largest_logits"),
    ("training/optimizers.npz", "bnb_adamw32", f"{OPTIMIZERS}[device-32-1]"),
    ("training/optimizers.npz", "bnb_adamw8", f"{OPTIMIZERS}[host-8-3]"),
    ("training/trajectory.npz", "grad_norm", f"{TRAINING}[device]"),
]
ARRAYS = [row for row in SPOILED if row[0].endswith(".npz")]
FIRST = {file.split("/")[0]: (file, key, test) for file, key, test in reversed(ARRAYS)}  # a folder


def test_every_folder_has_a_row():
    folders = {folder.name for folder in GOLDEN.iterdir() if folder.is_dir()}
    assert folders | SELF_CONTAINED == {file.split("/")[0] for file, _, _ in SPOILED}


class Reports(list):
    """A plugin of pytest that keeps the reports on tests as they were called."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            self.append(report)


@pytest.mark.parametrize(("file", "key", "test"), tiered(ARRAYS, FIRST.values()))
def test_a_spoiled_array_makes_its_test_fail(monkeypatch, file, key, test):
    """Within this process, which has compiled most of the programs already."""
    if not (GOLDEN / file).exists():
        pytest.skip(f"QLORA_GOLDEN has no {file}")
    read, reports = golden_data.read_arrays, Reports()

    def spoiled(path: Path) -> dict[str, np.ndarray]:
        arrays = read(path)
        if Path(path) == golden_data.golden_folder(file.split("/")[0]).parent / file:
            arrays[key] = golden_data.changed(arrays[key])
        return arrays

    monkeypatch.setattr(golden_data, "read_arrays", spoiled)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    pytest.main([*options, "-q", "-m", "not gpu", test], plugins=[reports])
    (report,) = reports
    assert report.failed
    assert "AssertionError" in str(report.longrepr)


def test_spoiled_files_make_their_tests_fail(tmp_path):
    """In a process of its own, whose golden folder has files with another value."""
    rows = [row for row in SPOILED if row not in ARRAYS and (GOLDEN / row[0]).exists()]
    if not rows:
        pytest.skip("QLORA_GOLDEN has none of the files")
    golden = shutil.copytree(GOLDEN, tmp_path / "golden")
    for file, key, _ in rows:
        spoil(golden / file, key)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider"]
        + [test for _, _, test in rows],
        env={**os.environ, "QLORA_GOLDEN": str(golden)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    # 1: collected, run, failed; any other code is an accident that proves nothing.
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(rows)} failed in" in done.stdout, done.stdout
    assert len(re.findall(r"^\S+:\d+: AssertionError", done.stdout, re.MULTILINE)) == len(rows)

"""What users get wrong: one line, exit code 2, the plain word, the value; nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.cli.main import main
from tests.tiny_model import write_tiny_model

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4900000000\n"
UP = "model.layers.1.mlp.up_proj.weight"


def leave(folder: Path) -> None:
    """Nothing is wrong with the files."""


def truncated(folder: Path) -> None:
    path = folder / "model" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def pointer(folder: Path) -> None:
    (folder / "model" / WEIGHTS).write_bytes(POINTER)


def configured(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_config(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def poisoned(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / WEIGHTS
        arrays = load_file(path)
        arrays[UP] = arrays[UP].copy()
        arrays[UP][3, 5] = value
        save_file(arrays, path)

    return change


def sharded(shard: str) -> Callable[[Path], None]:
    """An index that places every tensor in `shard`, which is not in the folder."""

    def change(folder: Path) -> None:
        path = folder / "model" / WEIGHTS
        names = list(load_file(path))
        path.rename(folder / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def bad_row(folder: Path) -> None:
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"text": 7}\n')


class Case(NamedTuple):
    """Something wrong: what is done to the files, the command, and what its line must hold."""

    spoil: Callable[[Path], None]
    argv: str
    says: tuple[str, ...]


TRAIN = "train c.yaml"
CASES = {
    "missing config": Case(leave, "train nothing.yaml", ("missing", "nothing.yaml")),
    "unknown key": Case(leave, f"{TRAIN} lora_rr=8", ("unknown key", "lora_rr", "lora_r.")),
    "value out of range": Case(leave, f"{TRAIN} lora_r=0", ("0 (expected", "1 to 4096")),
    "value of another type": Case(leave, f"{TRAIN} packing=7", ("packing", "7", "true or false")),
    "missing model": Case(leave, f"{TRAIN} model=nowhere", ("missing", "nowhere")),
    "missing dataset": Case(leave, f"{TRAIN} dataset=no.jsonl", ("MISSING", "no.jsonl")),
    "malformed row": Case(bad_row, TRAIN, ("train.jsonl:4", "text")),
    "row that is no JSON": Case(
        lambda folder: (folder / "train.jsonl").write_text('{"text": "a b c"}\n{oops\n'),
        TRAIN,
        ("train.jsonl:2",),
    ),
    "targets": Case(
        leave, f"{TRAIN} target_modules=[q_prj]", ("'q_prj' matches no linear", "q_proj")
    ),
    "targets by pattern": Case(
        leave, f"{TRAIN} target_modules=q_prj.*", ("'q_prj.*' matches no module", "q_proj")
    ),
    "truncated weights": Case(truncated, TRAIN, (WEIGHTS, "bytes")),
    "Git-LFS pointer": Case(pointer, TRAIN, ("Git-LFS pointer", "4.9 GB", "git lfs pull")),
    "unknown architecture": Case(
        configured(model_type="lama"), TRAIN, ("unknown architecture", "'lama'", "llama")
    ),
    "shape mismatch": Case(
        configured(intermediate_size=256), TRAIN, ("shape", "(128, 64)", "(256, 64)", "gate_proj")
    ),
    "missing config.json": Case(without_config, TRAIN, ("missing config.json",)),
    "NaN in a weight": Case(poisoned(np.nan), TRAIN, ("nan", "finite", UP, "(3, 5)")),
    "Inf in a weight": Case(poisoned(-np.inf), TRAIN, ("-inf", "finite", UP, "(3, 5)")),
    "shard name outside": Case(
        sharded("../outside.safetensors"), TRAIN, ("../outside.safetensors", "inside the folder")
    ),
    "missing shard": Case(
        sharded("model-00001-of-00001.safetensors"), TRAIN, ("missing shards", "model-00001-of")
    ),
    "missing adapter": Case(leave, f"{TRAIN} adapter=nowhere", ("missing adapter", "nowhere")),
    "missing adapter to generate": Case(
        leave, "generate model --adapter nowhere --prompt a", ("missing adapter", "nowhere")
    ),
    "missing adapter to evaluate": Case(
        leave,
        "evaluate model --data train.jsonl --adapter nowhere",
        ("missing adapter", "nowhere"),
    ),
    "missing adapter to merge": Case(
        leave, "merge nowhere out --model model", ("missing adapter", "nowhere")
    ),
    "missing adapter to export": Case(
        leave, "export nowhere out --format peft", ("missing adapter", "nowhere")
    ),
    "unknown command": Case(leave, "trian c.yaml", ("unknown command 'trian'", "qlora-jax train")),
    "unknown option": Case(leave, "train c.yaml --fast", ("--fast",)),
    "missing argument": Case(leave, "evaluate model", ("--data",)),
    "output that exists": Case(leave, "quantize model model", ("exists already",)),
    "a run's folder that is not empty": Case(leave, f"{TRAIN} output_dir=model", ("not empty",)),
    "nothing to resume": Case(leave, f"{TRAIN} --resume auto", ("missing", "resume")),
    "too long for the model": Case(
        leave, f"{TRAIN} max_seq_length=100000", ("100,000", "at most 128")
    ),
    "block size": Case(leave, "quantize model out --block-size 63", ("63", "64")),
    "an unknown format": Case(leave, "export model out --format pft", ("unknown", "peft")),
    "sampling": Case(leave, "generate model --prompt a --top-p 2", ("top_p", "2")),
    "two adapters for one text": Case(
        leave, "generate model --prompt a --adapter a --adapter b", ("--adapter", "twice: a")
    ),
    "template": Case(leave, f"{TRAIN} chat_template=no.jinja", ("missing", "no.jinja")),
    "unused key": Case(leave, f"{TRAIN} eval_steps=5", ("eval_steps", "no effect")),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    rows = [{"text": "to be or not to be"}, {"text": "that is"}, {"text": "the question"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text(
        "model: model\ndataset: train.jsonl\noutput_dir: out\n"
        "max_seq_length: 32\nmax_steps: 1\ndtype: float32\n"
    )
    return folder


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A copy of the tiny model with a configuration that trains, as the current folder."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def check_line(error: str, says: tuple[str, ...]) -> None:
    assert error.startswith("error["), error
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    for text in says:
        assert text in error


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(name, folder, capsys):
    spoil, argv, says = CASES[name]
    spoil(folder)
    before = files(folder)
    code = main(argv.split())
    error = capsys.readouterr().err
    assert code == 2, error
    check_line(error, says)
    assert files(folder) == before


@pytest.mark.parametrize("name", ["Git-LFS pointer", "unknown command"])
def test_the_program_itself_says_so_too(name, folder):
    spoil, argv, says = CASES[name]
    spoil(folder)
    done = subprocess.run(
        [sys.executable, "-m", "qlora_jax", *argv.split()], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    check_line(done.stderr, says)


def test_what_is_spoiled_here_trains_when_it_is_not(folder, capsys):
    assert main([*TRAIN.split(), "--dry-run"]) == 0
    assert "all is well" in capsys.readouterr().out
    assert not (folder / "out").exists()


def test_validate_says_all_at_once(folder, capsys):
    bad_row(folder)
    configured(intermediate_size=256)(folder)
    argv = "validate c.yaml lora_rr=1 learning_rate=5 target_modules=[q_prj] output_dir=model"
    before = files(folder)
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    for text in ("lora_rr", "learning_rate", "q_prj", "not empty", "train.jsonl:4", "shape"):
        assert error.count(text) >= 1, text
    assert len(error.splitlines()) == 7
    assert error.splitlines()[-1].startswith("6 errors")
    assert files(folder) == before


def test_validate_looks_for_the_data_of_a_missing_model(folder, capsys):
    assert main(["validate", "c.yaml", "model=nowhere", "dataset=no.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "no.jsonl" in error

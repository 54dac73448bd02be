"""Each command from its arguments to its files, on a model of two layers."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from qlora_jax.checkpoints.orbax_io import load_orbax
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.cli.main import main
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows.describe import describe
from qlora_jax.workflows.open import load
from tests.tiers import tiered
from tests.tiny_model import write_tiny_model

ROWS = [("What is two and two?", "Four."), ("And three?", "Five, then."), ("Again?", "No.")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, its 4-bit copy, data, a configuration and a finished run."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model")
    with open(folder / "train.jsonl", "w") as file:
        for prompt, answer in ROWS:
            turns = [("user", prompt), ("assistant", answer)]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "text.txt").write_text("to be or not to be, that is the question " * 4)
    (folder / "c.yaml").write_text(
        "model: model\ndataset: train.jsonl\noutput_dir: run\nmax_seq_length: 64\n"
        "gradient_accumulation_steps: 1\nmax_steps: 4\nsave_steps: 2\nlogging_steps: 1\n"
        "lora_r: 4\nlora_alpha: 8\nlearning_rate: 1e-2\n"
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "c.yaml"]) == 0
        assert main(["quantize", "model", "model-4bit", "--report"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at_home(home, tmp_path, monkeypatch):
    """The folder as the current one; what a test writes goes to its own `tmp_path`."""
    monkeypatch.chdir(home)
    return tmp_path


def test_train_leaves_a_run(home):
    names = {path.name for path in (home / "run").iterdir()}
    expected = "config.yaml environment.json train.log metrics.jsonl summary.json loss.png"
    adapter = "adapter_model.safetensors adapter_config.json tokenizer.json chat_template.jinja"
    assert {*expected.split(), *adapter.split(), "qlora_jax.json"} <= names
    assert {"checkpoint-2", "checkpoint-4"} <= names
    facts = json.loads((home / "run" / "qlora_jax.json").read_text())
    assert facts["quantization"] == {"kind": "nf4", "block_size": 64, "double_quant": True}
    assert facts["stop_tokens"] == ["</s>"]
    assert TrainConfig.from_yaml(home / "run" / "config.yaml").lora_r == 4


def test_train_says_what_it_does(home):
    lines = (home / "run" / "train.log").read_text().splitlines()
    said = {}
    for line in lines:
        topic, text = line[:10].strip(), line[11:]
        said[topic] = f"{said.get(topic, '')}\n{text}"
    assert "llama, 2 layers" in said["model"]
    assert "bits each" in said["model"]
    assert "r 4, scale alpha/r = 2" in said["adapter"]
    assert "self_attn.q_proj" in said["targets"]
    assert "rows 3, kept 3" in said["data"]
    assert "% filled" in said["data"]
    assert "4 steps of 1 rows" in said["step"]
    assert "nf4_matmul by cpu" in said["backend"]
    assert said["compiling"].startswith("\n(once")
    assert {"devices", "optimizer", "remat", "dtype"} <= said.keys()
    assert sum(line.startswith("step ") and "loss" in line for line in lines) == 4
    assert lines[-1].startswith("done ")


def test_dry_run_writes_nothing(at_home, capsys):
    out = at_home / "new"
    assert main(["train", "c.yaml", f"output_dir={out}", "--dry-run"]) == 0
    assert "backend" in capsys.readouterr().out
    assert not out.exists()


def test_resume_goes_on(at_home, capsys):
    assert main(["train", "c.yaml", f"output_dir={at_home / 'run'}", "max_steps=2"]) == 0
    arguments = ["train", "c.yaml", f"output_dir={at_home / 'run'}", "--resume", "auto"]
    assert main([*arguments, "max_steps=3"]) == 0
    assert "(step 2 of 3)" in capsys.readouterr().out
    assert main([*arguments, "max_steps=3", "lora_r=8"]) == 3
    assert "lora_r 4 -> 8" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_saves_and_says_143(home, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "qlora_jax", "train", "c.yaml", f"output_dir={out}"]
    process = subprocess.Popen(
        [*command, "max_steps=1000000", "save_steps=1000000"],
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143, error
    assert "stopped by SIGTERM" in error
    (checkpoint,) = out.glob("checkpoint-*")
    assert (checkpoint / "state" / "manifest.json").exists()


def test_validate(at_home, capsys):
    assert main(["validate", "c.yaml", f"output_dir={at_home / 'new'}"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for part in ("config", "output_dir", "model", "tokenizer", "data", "targets"):
        assert f"ok  {part}" in shown.out
    assert not (at_home / "new").exists()


def test_data(at_home, capsys):
    assert main(["data", "c.yaml", "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "train.jsonl:1: " in shown
    assert "train.jsonl:2: " not in shown
    assert "assistant: Four.</s>" in shown
    assert "length in tokens   sequences" in shown
    assert "0 rows truncated" in shown
    assert "0 rows dropped: all labels masked" in shown


def test_data_with_the_mask(at_home, capsys):
    assert main(["data", "c.yaml", "-n", "1", "--show-mask"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    trained = [row[3] for row in rows if len(row) == 4 and row[2] == "yes"]
    assert trained == [*"Four.", "</s>"]


def test_quantize(home):
    assert describe(home / "model-4bit").kind == "4-bit model"
    names = {path.name for path in (home / "model-4bit").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "quantization.json"} <= names
    assert (home / "model-4bit" / "quantization.png").read_bytes()[1:4] == b"PNG"
    report = json.loads((home / "model-4bit" / "quantization.json").read_text())
    assert 0 < report["total"]["relative_error"] < 0.2
    (now, _), (before, _) = load(home / "model"), load(home / "model-4bit")
    same = jax.tree.map(np.array_equal, now.weights(), before.weights())
    assert all(jax.tree.leaves(same))


def test_quantize_says_what_it_lost(at_home, capsys):
    out = at_home / "int4"
    arguments = ["--kind", "int4", "--block-size", "32", "--no-double-quant", "--report"]
    assert main(["quantize", "model", str(out), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "mlp.down_proj" in shown
    assert "quantization.png" in shown
    assert describe(out).weights[1].stored == "int4, block 32, float32 scales"
    assert main(["quantize", str(out), str(at_home / "again")]) == 2
    assert "quantized already" in capsys.readouterr().err


def test_evaluate_shows_the_base_beside_each_adapter(at_home, capsys):
    adapters = ["--adapter", "run", "--adapter", "run/checkpoint-2"]
    assert main(["evaluate", "model", "--data", "train.jsonl", *adapters, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["base", "run", "run/checkpoint-2"]
    assert found["run"]["loss"] < found["run/checkpoint-2"]["loss"] < found["base"]["loss"]
    assert main(["evaluate", "model", "--data", "text.txt", "--seq-len", "32"]) == 0
    assert "155 predicted tokens" in capsys.readouterr().out  # 5 windows of 32


def test_generate(at_home, capsys, monkeypatch):
    options = ["--adapter", "run", "--max-new-tokens", "8"]
    assert main(["generate", "model", "--prompt", "Again?", *options]) == 0
    chat = capsys.readouterr().out
    assert main(["generate", "model-4bit", "--prompt", "Again?", *options]) == 0
    assert capsys.readouterr().out == chat
    monkeypatch.setattr(sys, "stdin", io.StringIO("Again?\n"))
    assert main(["generate", "model", "--raw", "--temperature", "1", *options]) == 0
    assert capsys.readouterr().out != chat


@pytest.mark.parametrize("dtype", tiered(["float32", "bfloat16"], ["float32"]))
def test_merge(at_home, capsys, dtype):
    out = at_home / "merged"
    assert main(["merge", "run", str(out), "--model", "model", "--dtype", dtype]) == 0
    assert "logits differ from base + adapter by" in capsys.readouterr().out
    assert (out / "tokenizer.json").exists()
    with Shards(out) as source:
        assert {source.dtype(name) for name in source.names()} == {dtype}


def test_a_merge_into_the_original_weights_tells_what_that_changes(at_home, capsys):
    """The check is of the base that was merged into, and passes."""
    arguments = ["--model", "model", "--base", "original", "--dtype", "float32"]
    assert main(["merge", "run", str(at_home / "merged"), *arguments]) == 0
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if "that were trained they differ by" in line]
    assert float(line.rsplit(" ", 1)[1]) > 1e-3
    assert float(told.partition("base + adapter by ")[2].partition(" ")[0]) < 1e-3


def test_a_merge_that_differs_too_much_is_not_the_result(at_home, capsys):
    out = at_home / "merged"
    arguments = ["--model", "model", "--dtype", "bfloat16", "--tolerance", "1e-6"]
    for kept in ("merged.failed", "merged.failed-2"):
        assert main(["merge", "run", f"{out}/", *arguments]) == 5
        error = capsys.readouterr().err
        assert "logits differ by" in error
        assert error.endswith(f"see {at_home / kept}.\n")
        assert {path.name for path in (at_home / kept).iterdir()} >= {"config.json"}
    assert not out.exists()


def test_an_adapter_of_another_base_is_refused(at_home, capsys):
    other = write_tiny_model(at_home / "other")
    with Shards(other) as source:
        arrays = {name: source.read(name) for name in source.names()}
    arrays["model.embed_tokens.weight"][0] += 1
    from safetensors.numpy import save_file

    save_file(arrays, other / "model.safetensors")
    arguments = ["evaluate", str(other), "--data", "text.txt", "--adapter", "run"]
    assert main(arguments) == 3
    assert "another base" in capsys.readouterr().err
    assert main([*arguments, "--any-base"]) == 0


def test_export(at_home, capsys):
    def export(path, name, form, *more):
        assert main(["export", str(path), str(at_home / name), "--format", form, *more]) == 0
        return at_home / name

    def arrays(folder):
        return Path(folder, "adapter_model.safetensors").read_bytes()

    dense = export("model-4bit", "dense", "hf", "--dtype", "float32")
    assert describe(dense).kind == "model"
    assert (dense / "tokenizer.json").exists()
    peft = export("run/checkpoint-2", "peft", "peft", "--model", "model")
    assert arrays(peft) == arrays("run/checkpoint-2")
    orbax = export("run", "orbax", "orbax", "--model", "model")
    assert capsys.readouterr().out.count("no tokenizer") == 1
    assert arrays(export(orbax, "back", "peft")) == arrays("run")
    assert "has no tokenizer" in capsys.readouterr().out
    weights = load_orbax(export("model", "parameters", "orbax"))
    assert weights["model.layers.mlp.up_proj.weight"].shape == (2, 128, 64)

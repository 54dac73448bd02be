"""README's Python runs as it stands, block after block in one namespace; then its conversions.

Only what a reader would put in is put in: a model of two layers for "path/to/model", a file of
four conversations for "train.jsonl", two steps for 500 and 64 tokens for 2048.
"""

import json
import re
from pathlib import Path

import numpy as np

from qlora_jax.cli.main import main
from tests.tiny_model import write_tiny_model

README = Path(__file__).parent.parent / "README.md"
PUT_IN = {
    '"path/to/model"': '"tiny"',
    "max_steps=500": "max_steps=2",
    "max_seq_length=2048": "max_seq_length=64",
}


def blocks() -> list[str]:
    text = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = "\0".join(text)
    for written, used in PUT_IN.items():
        assert written in code, f"README no longer says {written}"
        code = code.replace(written, used)
    return code.split("\0")


def commands() -> list[list[str]]:
    """The commands of "From PyTorch and back", on the same model."""
    section = README.read_text().split("## From PyTorch and back")[1]
    lines = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert all(line.startswith("qlora-jax ") for line in lines)
    return [line.split("#")[0].replace("MODEL", "tiny").split()[1:] for line in lines]


def test_readmes_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "tiny")
    with open("train.jsonl", "w") as file:
        for n in range(4):
            messages = [
                {"role": "user", "content": f"{n} + {n}?"},
                {"role": "assistant", "content": f"{n + n}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")

    ten_lines, own_loop, many_adapters = blocks()
    names: dict = {}
    exec(compile(ten_lines, "README.md, first block", "exec"), names)
    assert capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert any(np.any(pair["B"]) for pair in names["run"].lora.params.values())
    assert names["dense"]

    exec(compile(own_loop, "README.md, second block", "exec"), names)
    assert np.isfinite(names["loss"])
    assert any(np.any(pair["B"]) for pair in names["params"].values())

    exec(compile(many_adapters, "README.md, third block", "exec"), names)
    assert len(names["texts"]) == 2
    assert np.isfinite(names["logits"]).all()

    for arguments in commands():
        assert main(arguments) == 0, capsys.readouterr().err
        assert Path(arguments[2]).exists()

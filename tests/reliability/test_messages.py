"""R39: every error code has a golden message, in the one form that all have.

messages.json holds a message of each code and the test that makes it. `make test-reliability` runs
those tests again and looks for the message. A new code is one more entry; what a test makes is told
by

    MESSAGES_OUT=found.json pytest -p tests.reliability.recorder tests/that/test_of_yours.py
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.checkpoints import files, gguf_header, manifest, orbax_io
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.data import tokenizer_json
from qlora_jax.data.rows import read_saved
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import QloraError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from tests.reliability import clean

RULE = "R39"
ROOT = Path(__file__).parents[2]
MESSAGES = json.loads((Path(__file__).parent / "messages.json").read_text())
CODE = re.compile(r"[A-Z][A-Z0-9]{1,6}(-[A-Z0-9]+)+")
LONGEST = 700
FOLDERS = ("checkpoints", "data", "models")


def missing(folder: Path, patch) -> None:
    files.open_regular(folder / "nothing")


def long_header(folder: Path, patch) -> None:
    patch.setattr(gguf_header, "MAX_HEADER", 999)
    GGUF(clean.gguf_model(folder) / "model.gguf")


def large_file(folder: Path, patch) -> None:
    patch.setattr(tokenizer_json, "MAX_BYTES", 99)
    load_tokenizer(clean.tokenizer(folder))


def decoder(change: Callable[[dict], object]) -> Callable:
    def build(folder: Path, patch) -> None:
        with Shards(clean.model(folder)) as source:
            config = ModelConfig.from_dict(source.config)
            weights = load_weights(source, config)
        change(weights)
        Decoder.from_weights(config, weights)

    return build


def orbax_lost(folder: Path, patch) -> None:
    """The manifest and the files agree, and Orbax's own are not there."""
    clean.orbax(folder)
    content = json.loads((folder / "manifest.json").read_text())
    shutil.rmtree(folder / "arrays")
    manifest.write_manifest(folder, {key: content[key] for key in ("tree", "leaves", "metadata")})
    orbax_io.load_orbax(folder)


def orbax_there(folder: Path, patch) -> None:
    folder.mkdir()
    orbax_io.write_arrays(folder, {"a": np.ones(2)})


def saved_rows(folder: Path, patch) -> None:
    folder.mkdir()
    list(read_saved(folder, "train"))


NORM = "model.norm.weight"
RARE = {  # codes that no test of the formats has a file for
    "DATA-SAVED": saved_rows,
    "FILE-MISSING": missing,
    "GG-HEADER": long_header,
    "MODEL-MISSING": decoder(lambda weights: weights.pop(NORM)),
    "MODEL-SHAPE": decoder(lambda weights: weights.update({NORM: weights[NORM][:3]})),
    "MODEL-UNKNOWN": decoder(lambda weights: weights.update(x=weights[NORM])),
    "ORB-READ": orbax_lost,
    "ORB-WRITE": orbax_there,
    "TOK-SIZE": large_file,
}


@pytest.mark.parametrize("code", RARE)
def test_a_rare_error(code, tmp_path, monkeypatch):
    with pytest.raises(QloraError) as caught:
        RARE[code](tmp_path / "case", monkeypatch)
    assert caught.value.code == code


def codes_of(path: Path) -> set[str]:
    """Texts of a file that look like codes, docstrings and parts of texts left out."""
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str]
    return {text for text in texts if CODE.fullmatch(text)}


def test_every_code_has_a_message():
    modules = [path for folder in FOLDERS for path in (ROOT / "qlora_jax" / folder).glob("*.py")]
    codes = set().union(*map(codes_of, modules)) - {"UTF-8"}
    assert len(codes) > 150
    assert codes - MESSAGES.keys() == set()


@pytest.mark.parametrize("code", MESSAGES)
def test_a_message_has_the_form_that_all_have(code):
    message = MESSAGES[code]["message"]
    assert re.fullmatch(rf"error\[{code}\]: [^\n]+?: [^\n]+\.", message)
    assert message.isprintable()
    assert len(message) < LONGEST
    assert not re.search(r"Traceback|object at 0x|<class |Error\(", message)


@pytest.mark.slow
def test_the_messages_are_what_is_said(tmp_path):
    tests = sorted({row["test"] for row in MESSAGES.values()})
    environment = os.environ | {"MESSAGES_OUT": str(tmp_path / "found.json")}
    environment.pop("RELIABILITY_JSON", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.reliability.recorder", *tests]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    found = json.loads((tmp_path / "found.json").read_text())
    other = {
        code: (row["message"], list(found.get(code, {})))
        for code, row in MESSAGES.items()
        if row["message"] not in found.get(code, {})
    }
    assert other == {}

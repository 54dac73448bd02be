"""R14: a converter, a merge or an export that is killed leaves nothing under the final name.

The same command then succeeds, with the same bytes, and removes what the dead one left.
"""

import hashlib

import pytest

from tests.golden_data import golden_folder
from tests.reliability.killing import Killer
from tests.tiny_model import write_tiny_model

RULE = "R14"
KILLS = 8  # of each command


@pytest.fixture(scope="module")
def run():
    with Killer() as killer:
        yield killer


@pytest.fixture(scope="module")
def home(tmp_path_factory, run):
    """A folder with a model, its 4-bit copy, and an adapter of another model with that model."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model")
    assert run(["quantize", str(folder / "model"), str(folder / "model-4bit")]).code == 0
    return folder


def command(home, name, out):
    """The arguments of a conversion by its name."""
    adapters = golden_folder("adapters")
    return {
        "quantize": ["quantize", str(home / "model"), str(out)],
        "merge": ["merge", str(adapters / "plain"), str(out), "--model", str(adapters / "base")],
        "export hf": ["export", str(home / "model-4bit"), str(out), "--format", "hf"],
        "export bnb-4bit": ["export", str(home / "model"), str(out), "--format", "bnb-4bit"],
        "export peft": [
            *("export", str(adapters / "plain"), str(out), "--format", "peft"),
            *("--model", str(adapters / "base")),
        ],
        "export gguf": ["export", str(home / "model"), str(out), "--format", "gguf"],
    }[name]


def digests(path):
    """The content of every file in a folder, or of one file, by name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path): hashlib.sha256(p.read_bytes()).digest() for p in files}


def check_kills(run, home, tmp_path, name, moments):
    """Kills at each moment, a share of the steps of a whole run."""
    out = "out.gguf" if name == "export gguf" else "out"
    (tmp_path / "whole").mkdir()
    whole = run(command(home, name, tmp_path / "whole" / out))
    assert whole.code == 0
    expected = digests(tmp_path / "whole" / out)
    for number, moment in enumerate(moments):
        folder = tmp_path / f"kill-{number}"
        folder.mkdir()
        arguments = command(home, name, folder / out)
        killed = run(arguments, kill=1 + int(moment * whole.steps))
        assert killed.code == -9
        if (folder / out).exists():  # killed between its appearance and the end
            assert digests(folder / out) == expected
            continue
        assert run(arguments).code == 0
        assert digests(folder / out) == expected
        assert [path.name for path in folder.iterdir()] == [out]


@pytest.mark.parametrize("name", ["quantize", "export gguf"])  # a folder and a file
def test_two_kills(run, home, tmp_path, name):
    check_kills(run, home, tmp_path, name, [0.5, 0.95])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["quantize", "merge", "export hf", "export bnb-4bit", "export peft", "export gguf"]
)
def test_many_kills(run, home, tmp_path, name):
    check_kills(run, home, tmp_path, name, [number / KILLS for number in range(KILLS)])


@pytest.mark.parametrize("name", ["quantize", "export hf"])
def test_onto_itself_is_refused(run, home, name):
    source = home / ("model" if name == "quantize" else "model-4bit")
    before = digests(source)
    assert run(command(home, name, source)).code == 2
    assert digests(source) == before

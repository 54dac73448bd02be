"""The command line: one line for a user's error, exit codes, no traceback unless asked for."""

import json
import shutil
import subprocess
import sys
import types

import pytest

from qlora_jax.cli import main as cli
from qlora_jax.errors import DoesNotFit
from tests.golden_data import GOLDEN


@pytest.fixture
def command(monkeypatch):
    """A command `do` whose `run` is what the test returns from it."""
    module = types.ModuleType("qlora_jax.cli.do", "Does it.\n\nAnd more.")
    module.arguments = lambda parser: parser.add_argument("--count", type=int, default=1)
    module.run = lambda args: args.count
    monkeypatch.setitem(sys.modules, "qlora_jax.cli.do", module)
    monkeypatch.setitem(cli.COMMANDS, "do", "does it")
    return module


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb, about in cli.COMMANDS.items():
        assert f"  {verb} " in shown
        assert about in shown


def test_no_command_shows_help(capsys):
    assert cli.main([]) == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_every_command_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([verb, "--help"])
    assert done.value.code == 0
    assert f"usage: qlora-jax {verb}" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["docter"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown command 'docter'" in error
    assert error.endswith("Try: qlora-jax doctor.\n")


def test_a_wrong_option_is_one_line(command, capsys):
    assert cli.main(["do", "--count", "many"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[CLI-ARGS]: qlora-jax do: argument --count: invalid int value:")
    assert error.count("\n") == 1


def test_exit_code_is_the_commands(command):
    assert cli.main(["do", "--count", "7"]) == 7
    command.run = lambda args: None
    assert cli.main(["do"]) == 0


def test_an_error_is_one_line_and_its_class_exit_code(command, capsys):
    def run(args):
        raise DoesNotFit("MEM-GPU", "config.yaml", "30 GB", "24 GB", "batch_size=1")

    command.run = run
    assert cli.main(["do"]) == 4
    assert capsys.readouterr().err == (
        "error[MEM-GPU]: config.yaml: 30 GB (expected 24 GB). Try: batch_size=1.\n"
    )
    with pytest.raises(DoesNotFit):
        cli.main(["do", "--debug"])


def test_a_bug_of_ours_keeps_its_traceback(command):
    def run(args):
        raise ZeroDivisionError

    command.run = run
    with pytest.raises(ZeroDivisionError):
        cli.main(["do"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmore"), "Out of memory"),
    ],
)
def test_memory_that_runs_out_is_one_line_and_4(command, capsys, error, said):
    def run(args):
        raise error

    command.run = run
    assert cli.main(["do"]) == 4
    shown = capsys.readouterr().err
    assert shown.startswith("error[MEMORY]: memory: ran out: ")
    assert said in shown
    assert shown.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["do", "--debug"])


def test_ctrl_c_is_130(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command.run = run
    assert cli.main(["do"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_closed_pipe_is_quiet():
    program = (
        "import sys; from qlora_jax.cli import main as cli; "
        "cli.overview = lambda: 'x' * 10_000_000; sys.exit(cli.main(['--help']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait() == 0


@pytest.mark.filterwarnings("default")
def test_a_note_is_one_line(tmp_path, capsys):
    shutil.copytree(GOLDEN / "models" / "llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"written_by": "someone"}))
    assert cli.main(["inspect", str(tmp_path / "model")]) == 0
    expected = f"note       {tmp_path}/model: not known, not read: written_by\n"
    assert capsys.readouterr().err == expected

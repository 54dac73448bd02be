"""A folder appears whole or not at all; nothing is overwritten, nothing is left behind."""

import os
import signal
import subprocess
import sys

import pytest

from qlora_jax.checkpoints import atomic
from qlora_jax.checkpoints.atomic import new_file, new_folder, refuse_too_large, write_file
from qlora_jax.errors import InputError, StorageError

WRITER = """
import sys, time
from qlora_jax.checkpoints import atomic
with getattr(atomic, sys.argv[2])(sys.argv[1]) as new:
    (new / "half" if sys.argv[2] == "new_folder" else new).write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_appears_at_the_end(tmp_path):
    path = tmp_path / "a" / "b" / "out"
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "x"
    assert os.listdir(path.parent) == ["out"]


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a" / "out.gguf"
    with new_file(path) as file:
        file.write_text("x")
        assert file.name == "out.gguf"
        assert not path.exists()
    assert path.read_text() == "x"
    assert os.listdir(path.parent) == ["out.gguf"]


@pytest.mark.parametrize("new", [new_file, new_folder])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_leaves_nothing_on_failure(tmp_path, error, new):
    def fail():
        with new(tmp_path / "a" / "b" / "out") as path:
            (path / "file" if new is new_folder else path).write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_folder_inside_one_that_is_being_written(tmp_path):
    with new_folder(tmp_path / "outer") as outer, new_folder(outer / "inner") as inner:
        (inner / "file").write_text("x")
    assert (tmp_path / "outer" / "inner" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.rglob("*")] == ["outer", "inner", "file"]


@pytest.mark.parametrize("new", [new_file, new_folder])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_refuses_what_exists(tmp_path, kind, new):
    path = tmp_path / "out"
    {"file": path.touch, "folder": path.mkdir, "dangling link": lambda: path.symlink_to("no")}[
        kind
    ]()
    with pytest.raises(InputError, match=r"OUT-EXISTS.*out: exists already"), new(path):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["out"]


def test_refuses_what_appeared_meanwhile(tmp_path):
    with pytest.raises(InputError, match="OUT-EXISTS"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    def overtaken():
        with new_file(tmp_path / "out") as file:
            file.write_text("new")
            (tmp_path / "out").write_text("old")

    with pytest.raises(InputError, match="OUT-EXISTS"):
        overtaken()
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_removes_what_a_killed_writer_left_and_only_that(tmp_path, new):
    path = tmp_path / "out"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, new.__name__], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert len(os.listdir(tmp_path)) == 2
        with new(path) as temporary:
            assert len(os.listdir(tmp_path)) == 2  # ours and the living one's
            assert tmp_path in (temporary.parent, temporary.parent.parent)
            temporary.touch()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()


def test_a_folder_of_the_user_with_such_a_name_stays(tmp_path):
    names = [".out.old.tmp", ".out.0123abcd.bak.tmp", ".out.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out"])


def test_a_name_that_is_too_long_is_told(tmp_path):
    path = tmp_path / ("o" * 300) / "out"
    with pytest.raises(StorageError, match=r"OUT-WRITE.*File name too long"), new_folder(path):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


def test_disk_full_is_told_with_the_path(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with (
        pytest.raises(StorageError, match=r"OUT-FULL.*out: No space left.*GB free"),
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "file").write_text("x")
    with pytest.raises(StorageError, match="OUT-FULL"):
        write_file(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == []


def test_a_read_only_place_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="OUT-WRITE"), new_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_refuses_what_does_not_fit(tmp_path):
    refuse_too_large(tmp_path, 1)
    with pytest.raises(StorageError, match=r"needs 1000000000000000000 bytes .* are free"):
        refuse_too_large(tmp_path, 10**18)


def test_write_file_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    monkeypatch.setattr(atomic.os, "fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]

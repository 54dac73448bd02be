"""Ids of the Hub, which is played by a folder here: what is fetched, said, and refused."""

import dataclasses
import fnmatch
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

from qlora_jax.cli.main import main
from qlora_jax.errors import InputError
from qlora_jax.workflows import hub
from qlora_jax.workflows.open import load, open_source
from tests.tiny_model import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = "someone/tiny"


class HttpError(OSError):
    """As huggingface_hub's own: an answer of the server."""

    response = object()


class RepositoryNotFoundError(HttpError):
    """Neither public nor ours."""


class GatedRepoError(RepositoryNotFoundError):
    """Its terms were not accepted."""


class RevisionNotFoundError(HttpError):
    """No such branch."""


class DryRunError(OSError):
    """What a listing fails with; the reason is its cause."""


@dataclasses.dataclass
class File:
    """One row of a listing."""

    filename: str
    file_size: int
    will_download: bool
    commit_hash: str = COMMIT


class Hub:
    """A Hub with one repository, a folder; its cache has links into `blobs`, as the real one."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache = repository, cache
        self.failure: BaseException | None = None  # what the next call meets
        self.fetched: list[str] = []
        self.asked: list[str | None] = []

    @property
    def folder(self) -> Path:
        return self.cache / "models--someone--tiny" / "snapshots" / COMMIT

    def snapshot_download(self, repo_id, *, revision=None, dry_run=False, allow_patterns=None):
        assert repo_id == TINY
        if self.failure is not None and dry_run:
            raise DryRunError("the repository cannot be accessed") from self.failure
        if self.failure is not None:
            raise self.failure
        self.asked.append(revision)
        names = sorted(path.name for path in self.repository.iterdir())
        if dry_run:
            sizes = {name: (self.repository / name).stat().st_size for name in names}
            there = {name: (self.folder / name).exists() for name in names}
            return [File(name, sizes[name], not there[name]) for name in names]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetch(name)
        return str(self.folder)

    def fetch(self, name: str) -> None:
        if (self.folder / name).exists():
            return
        self.fetched.append(name)
        blob = self.folder.parent.parent / "blobs" / f"of-{name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.repository / name, blob)
        (self.folder / name).symlink_to(os.path.relpath(blob, self.folder))

    def try_to_load_from_cache(self, repo_id, filename, revision=None):
        path = self.folder / filename
        return str(path) if path.exists() else None


@pytest.fixture
def repository(tmp_path):
    """A tiny model with what else lies in repositories: code, pickles, another format, a readme."""
    folder = write_tiny_model(tmp_path / "elsewhere" / "repository")
    for name in ("modeling_tiny.py", "pytorch_model.bin", "README.md", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def fake(repository, tmp_path, monkeypatch):
    """The played Hub behind the package's two functions, in an empty current folder."""
    played = Hub(repository, tmp_path / "elsewhere" / "cache")
    for name in ("snapshot_download", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, getattr(played, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(played.cache))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.snapshot.cache_clear()
    yield played
    hub.snapshot.cache_clear()


def test_only_what_a_model_needs_is_fetched_and_said_before(fake, capsys):
    model, tokenizer = load(TINY)
    assert model.config.model_type == "llama"
    assert tokenizer.bos_token == "<s>"
    assert fake.asked == [None, COMMIT]  # what is fetched is the commit that was listed
    settings = ["config.json", "generation_config.json", "chat_template.jinja"]
    tokenizers = ["tokenizer.json", "tokenizer_config.json"]
    assert {*fake.fetched} == {*settings, *tokenizers, "model.safetensors"}
    size = sum((fake.repository / name).stat().st_size for name in fake.fetched) / 1e9
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"download   {TINY}, commit 01234567: 6 files, {size:.3g} GB, to {fake.cache}\n"
    )


def test_what_is_in_the_cache_is_no_download(fake, capsys):
    open_source(TINY).close()
    capsys.readouterr()
    hub.snapshot.cache_clear()  # as in another process
    open_source(TINY).close()
    assert capsys.readouterr().err == ""
    assert len(fake.fetched) == 6


def test_the_hub_is_asked_once_in_a_process(fake):
    open_source(TINY).close()
    fake.failure = ConnectionError("gone")
    open_source(TINY).close()


def test_a_revision(fake, capsys):
    open_source(f"{TINY}@refs/pr/1").close()
    assert fake.asked == ["refs/pr/1", COMMIT]
    assert f"{TINY}@refs/pr/1, commit" in capsys.readouterr().err


def test_a_command_takes_an_id(fake, capsys):
    assert main(["quantize", TINY, "out"]) == 0
    assert {"config.json", "tokenizer.json"} <= {path.name for path in Path("out").iterdir()}
    assert main(["inspect", TINY]) == 0
    assert capsys.readouterr().err.count("download ") == 1


def test_without_a_network_the_cache_is_taken_and_said(fake, capsys):
    open_source(TINY).close()
    hub.snapshot.cache_clear()
    capsys.readouterr()
    fake.failure = ConnectionError("no network")
    with open_source(TINY) as source:
        assert source.path == fake.folder
    assert capsys.readouterr().err == f"offline    {TINY} is taken from the cache: {fake.folder}\n"


FAILURES = {
    "HUB-OFFLINE": (ConnectionError("no\n\nnetwork"), "no network"),
    "HUB-MISSING": (RepositoryNotFoundError("401"), "no such model"),
    "HUB-GATED": (GatedRepoError("403"), f"https://huggingface.co/{TINY}, then hf auth login"),
    "HUB-REVISION": (RevisionNotFoundError("404"), "no such revision"),
    "HUB-READ": (HttpError("500 of the server"), "500 of the server"),
}


@pytest.mark.parametrize("code", FAILURES)
def test_what_the_hub_answers_is_one_line(code, fake, capsys):
    fake.failure, says = FAILURES[code]
    assert main(["quantize", TINY, "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error[{code}]: {TINY}: ")
    assert error.count("\n") == 1
    assert says in error
    assert not Path("out").exists()


def test_a_download_that_breaks_is_one_line(fake, monkeypatch):
    def fetch(name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fake, "fetch", fetch)
    with pytest.raises(InputError, match=r"No space left on device.*what has arrived is kept"):
        open_source(TINY)


def test_without_the_package(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import raises ImportError
    with pytest.raises(InputError, match=r"HUB-PACKAGE.*qlora-jax\[hub\]"):
        open_source(TINY)


def test_pickles_only_where_there_are_no_safetensors(repository):
    names = ["config.json", "pytorch_model.bin", "training_args.bin", "tokenizer.json", "a.py"]
    wanted = hub.HubId(TINY, None)
    expected = ["config.json", "tokenizer.json", "pytorch_model.bin"]
    assert hub.needed(wanted, names) == expected
    assert "pytorch_model.bin" not in hub.needed(wanted, [*names, "model.safetensors"])
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "model.safetensors.index.json"
    assert hub.needed(wanted, ["config.json", *parts, index, "model-x.safetensors"]) == [
        *("config.json", index),
        *parts,
    ]


OTHERS = {
    "a GGUF file": (["a-q4.gguf", "README.md"], "GGUF files alone: a-q4.gguf"),
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
    "a data set": (["train.parquet"], "holds no model: train.parquet"),
    "weights of code": (["config.json", "weights.pt"], "holds no model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_repository_of_something_else(name):
    names, says = OTHERS[name]
    with pytest.raises(InputError, match=f"HUB-FILES.*{says}"):
        hub.needed(hub.HubId(TINY, None), names)


def test_what_is_here_wins(fake, tmp_path):
    assert hub.hub_id(TINY) == hub.HubId(TINY, None)
    assert hub.hub_id(f"{TINY}@v1.0") == hub.HubId(TINY, "v1.0")
    shutil.copytree(fake.repository, TINY)
    assert hub.hub_id(TINY) is None
    with open_source(TINY) as source:
        assert source.path == Path(TINY)
    # A folder of that name is here: this is a misspelled path, not a stranger's model.
    assert hub.hub_id("someone/tyni") is None
    with pytest.raises(InputError, match="someone/ is a folder here"):
        open_source("someone/tyni")


def test_an_adapter_names_the_repository(fake):
    assert hub.repository(f"{TINY}@v1") == TINY
    assert hub.repository("some/where/else@v1") == "some/where/else@v1"
    assert hub.repository(None) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "tiny",
            "/someone/tiny",
            "./someone/tiny",
            "../tiny",
            "a/b/c",
            "a/..",
            "a/b..c",
            "~/tiny",
        ),
        *("someone/tiny.gguf", "a/b@", "a b/c", "a/b@c d", "-a/b", "a/", "/b", "a\\b", "ä/b", ""),
    ],
)
def test_what_is_no_id(text, fake):
    assert hub.hub_id(text) is None
    with pytest.raises(InputError, match=r"MODEL-|ST-|CFG-"):
        open_source(text)
    assert fake.asked == []


def test_a_path_object_is_a_path(fake):
    assert hub.hub_id(Path(TINY)) is None

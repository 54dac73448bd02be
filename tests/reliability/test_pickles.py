"""R22: forty hostile PyTorch files are refused, each by its rule, and nothing in them is done."""

import json
import multiprocessing
import os
import pickle
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.errors import InputError
from tests.checkpoints.torch_writer import zip_of
from tests.reliability.pickles import CANARY, CASES, MEMBERS, Case

RULE = "R22"
SECONDS = 2.0
MEMORY = 128 << 20  # bytes of address space beyond what a clean file needs
LIVE = {name: case for name, case in CASES.items() if case.program}


@dataclass
class Seen:
    """What one file did.

    Attributes:
      code: of the error; empty when it was loaded.
      seconds: of the processor.
      imported: modules that were not there before.
      events: audit events besides the opening of files in the folder.
    """

    code: str
    seconds: float
    imported: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def serve(pipe: Any, folder: Path) -> None:
    """The process: folders come in, a Seen goes out for each; the first one is clean."""
    os.chdir(folder)
    events: list[str] = []
    sys.addaudithook(lambda event, args: note(events, event, args, folder))
    first = True
    while path := pipe.recv():
        pipe.send(open_model(path, events))
        if first:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            first = False


def note(events: list[str], event: str, args: tuple, folder: Path) -> None:
    """Keeps what a reader of weights has no business to do."""
    inside = event == "open" and str(args[0]).startswith(str(folder))
    if not inside:
        events.append(f"{event} {str(args)[:80]}")


def open_model(path: Path, events: list[str]) -> Seen:
    from qlora_jax.checkpoints.shards import Shards

    before, started, code = set(sys.modules), time.process_time(), ""
    events.clear()
    try:
        with Shards(path) as shards:
            for name in shards.names():
                shards.read(name)
    except InputError as error:
        code = error.code
    seconds, found = time.process_time() - started, list(events)
    return Seen(code, seconds, sorted(set(sys.modules) - before), found)


def write(folder: Path, case: Case) -> Path:
    """A model's folder with the hostile file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / case.named).write_bytes(case.content)
    return folder


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A process that opens models, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("pickles")
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, folder), daemon=True)
    process.start()
    theirs.close()

    def victim(name: str, case: Case) -> Seen:
        pipe.send(write(folder / name, case))
        assert pipe.poll(30), "hangs"
        return pipe.recv()

    clean = victim("clean", Case(zip_of(MEMBERS), ""))
    assert clean.code == ""
    yield victim, folder
    pipe.send(None)
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.parametrize("name", CASES)
def test_is_refused_and_not_run(victim, name):
    open_it, folder = victim
    seen = open_it(name, CASES[name])
    assert seen.code == CASES[name].code
    assert seen.imported == []
    assert seen.events == []
    assert seen.seconds < SECONDS
    assert not (folder / CANARY).exists()


def test_there_are_forty():
    assert len(CASES) == 40
    assert len(LIVE) > 20


def run_all(folder: Path, names: list[str], pipe: Any) -> None:
    """A process that reads them with Python's pickle, as PyTorch once did."""
    os.chdir(folder)
    for name in names:
        if os.path.exists(CANARY):
            os.remove(CANARY)
        pickle.loads(LIVE[name].program)
        pipe.send(os.path.exists(CANARY))


def test_they_are_hostile(tmp_path):
    """A case that cannot do harm would show nothing."""
    pipe, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_all, args=(tmp_path, list(LIVE), theirs), daemon=True)
    process.start()
    theirs.close()
    harmless = [name for name in LIVE if not (pipe.poll(30) and pipe.recv())]
    process.join(10)
    assert harmless == []

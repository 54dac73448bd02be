"""R20, as the kernel sees it: Rust and C++ open files without Python's audit hook.

Fifty damaged checkpoints are opened under strace. Between two marks, no file outside the folder may
be opened, no program started, no connection made.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.reliability.test_mutated import KINDS
from tests.reliability.worker import OWN_FILES

RULE = "R20"
ROOT = Path(__file__).parents[2]
MARK = "/mark-of-a-test"
EACH = 10
SAMPLE = ["safetensors", "gguf", "bin", "json-tokenizer", "orbax"]
WITHOUT = (
    "no strace, so what tokenizers (Rust) and Orbax (C++) open themselves is not seen; "
    "install it (apt install strace) and run this again"
)
SYSTEM = ("/etc/localtime", "/etc/ld.so", "/usr/lib", "/usr/share/", "/lib", "/dev/", "/proc/")
PROGRAM = """
import os, sys
from pathlib import Path
from qlora_jax.errors import QloraError
from tests.reliability import loaders

load = getattr(loaders, sys.argv[1])
load(Path(sys.argv[2]))
load(Path(sys.argv[2]))
for path in sys.argv[3:]:
    try:
        os.open("MARK" + path, os.O_RDONLY)
    except FileNotFoundError:
        pass
    try:
        load(Path(path))
    except QloraError:
        pass
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason=WITHOUT)
@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_opened(name, tmp_path, record_property):
    kind, folders = KINDS[name], []
    pristine = kind.write(tmp_path / "clean")
    for seed in range(EACH):
        rng, folder = Random(f"strace {name} {seed}"), tmp_path / f"case-{seed}"
        shutil.copytree(pristine, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = rng.choice(files) if kind.files is None else folder / rng.choice(kind.files)
        path.write_bytes(kind.mutate(path.read_bytes(), rng)[0])
        folders.append(str(folder))
    log = tmp_path / "log"
    calls = "trace=open,openat,openat2,execve,connect"
    command = ["strace", "-f", "-qq", "-s", "500", "-e", calls, "-o", str(log)]
    program = [sys.executable, "-c", PROGRAM.replace("MARK", MARK), kind.loader, str(pristine)]
    done = subprocess.run(
        [*command, *program, *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wrong, own, here = [], set(), ""
    for line in log.read_text().splitlines():
        path = found[1] if (found := re.search(r'"((?:[^"\\]|\\.)*)"', line)) else ""
        if path.startswith(MARK):
            here = path.removeprefix(MARK)
        elif here and "openat" in line and (path == here or path.startswith(f"{here}/")):
            own.add(here)
        elif here and ("openat" not in line or not path.startswith((*OWN_FILES, *SYSTEM))):
            wrong.append(line)
    record_property("cases", EACH)
    record_property("passed", 0 if wrong else EACH)
    assert own == set(folders)
    assert wrong == []

"""A run's folder: who may write in it, what lies in it, which checkpoint is the newest.

out/ config.yaml environment.json metrics.jsonl train.log summary.json loss.png
     adapter_model.safetensors adapter_config.json ...      final: PEFT loads out/ itself
     best/                                                  the same files
     checkpoint-500/  the same files + state/               see run_state.py
"""

import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_jax.checkpoints.atomic import storage_errors, write_file
from qlora_jax.errors import InputError, Locked, StorageError
from qlora_jax.workflows.environment import environment

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCK = ".lock"


class RunFolder:
    """One run's folder, created if need be.

    Raises:
      InputError: as of `refuse_used`.
    """

    def __init__(self, path: str | Path, resume: bool):
        self.path = Path(path)
        refuse_used(path, resume)
        if not resume:
            with storage_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; the system lets go when the process ends, however.

        Raises:
          Locked: another process holds it.
        """
        with open(self.path / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise Locked(
                    "RUN-LOCKED", self.path, f"in use by {holder}", hint="wait, or stop it first"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def write_start(self, config_yaml: str) -> None:
        """config.yaml as resolved, and what it ran on."""
        write_file(self.path / "config.yaml", config_yaml.encode())
        write_json(self.path / "environment.json", environment())

    def logged(self, say: Callable[[str], object]) -> Callable[[str], None]:
        """`say`, with each line also at the end of train.log."""

        def both(line: str) -> None:
            say(line)
            path = self.path / "train.log"
            with storage_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")

        return both

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """All whole checkpoints, oldest first; one being written has another name."""
        found = [(p, CHECKPOINT.fullmatch(p.name)) for p in self.path.iterdir()]
        return [p for _, p in sorted((int(m[1]), p) for p, m in found if m)]

    def keep_newest(self, count: int | None) -> None:
        """Removes all but the newest `count` checkpoints, each renamed away before it goes."""
        for old in self.checkpoints()[: -count if count else None] if count else []:
            doomed = old.with_name(f".{old.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed)

    def resumed_checkpoint(self, resume: str | Path) -> Path:
        """The checkpoint to go on from: the newest for `auto`, else the one named.

        Raises:
          InputError: there is none.
        """
        if str(resume) == "auto":
            if not (found := self.checkpoints()):
                raise InputError(
                    "RUN-RESUME", self.path, "missing: no checkpoint to resume", hint="no --resume"
                )
            return found[-1]
        if not Path(resume).is_dir():
            raise InputError("RUN-RESUME", resume, "missing: no such checkpoint", hint="auto")
        return Path(resume)


def refuse_used(path: str | Path, resume: bool) -> None:
    """What a run may write into: a new or an empty folder; one that it resumes must be there.

    Raises:
      InputError: RUN-EXISTS when the folder holds something, RUN-FOLDER for a file, RUN-RESUME.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError("RUN-FOLDER", path, "is a file", "a folder", "another output_dir")
    if resume and not path.exists():
        found = "missing: no run to resume"
        raise InputError("RUN-RESUME", path, found, "a run's output_dir", "no --resume")
    found = [p.name for p in path.iterdir()] if path.exists() else []
    if not resume and [name for name in found if name != LOCK]:
        raise InputError(
            "RUN-EXISTS",
            path,
            f"output_dir is not empty ({len(found)} entries)",
            "a new or empty folder",
            "another output_dir, or --resume auto to go on with this run",
        )


def write_json(path: Path, content: dict) -> None:
    """A JSON file that people read too."""
    write_file(path, as_json(content))


def as_json(content: dict) -> bytes:
    """Indented, with a line feed at the end."""
    return (json.dumps(content, indent=2) + "\n").encode()


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below `path`."""
    return shutil.disk_usage(path).free


def refuse_small_disk(path: Path, needed: int) -> None:
    """Raises StorageError when fewer than `needed` bytes are free."""
    if (free := free_bytes(path)) < needed:
        raise StorageError(
            "RUN-DISK",
            path,
            f"{free / 1e9:.2f} GB free",
            f"{needed / 1e9:.2f} GB for two checkpoints",
            "another output_dir",
        )

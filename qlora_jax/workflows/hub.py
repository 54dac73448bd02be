"""Models of the Hugging Face Hub by their id: nothing is fetched before it is said, with its size.

    org/name             the newest commit
    org/name@revision    a branch, a tag or a commit

What is on this machine wins: an id is only what is no path and whose first part is no folder here.
Fetched are config.json, the tokenizer's files and the weights: pickles only where there are no
safetensors, code never. Without a network the snapshot in Hugging Face's cache is taken.
"""

import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.checkpoints.shards import INDEX, SINGLE, TORCH_INDEX, TORCH_SHARD, TORCH_SINGLE
from qlora_jax.errors import InputError, listed
from qlora_jax.workflows.companions import OTHERS, TOKENIZER

ID = re.compile(r"(?!.*\.\.)(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
NO_NAMES = (".gguf", ".safetensors", ".bin", ".json", ".yaml")  # endings of a file's name
WEIGHTS = (  # one file, or an index and shards whose names have two numbers
    (SINGLE, INDEX, re.compile(r"model-\d+-of-\d+\.safetensors")),
    (TORCH_SINGLE, TORCH_INDEX, TORCH_SHARD),
)
ANSWERS = {
    "GatedRepoError": (
        "HUB-GATED",
        "is gated, and this login has no access",
        "accept its terms at https://huggingface.co/{id}, then hf auth login",
    ),
    "RepositoryNotFoundError": (
        "HUB-MISSING",
        "is no path here, and the Hub has no such model, or a private one of others",
        "check the name; hf auth login for a private model",
    ),
    "RevisionNotFoundError": (
        "HUB-REVISION",
        "has no such revision",
        "{id}, or a branch, tag or commit that is listed at https://huggingface.co/{id}",
    ),
}


class HubId(NamedTuple):
    """`org/name`, and the revision behind its @."""

    id: str
    revision: str | None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def hub_id(path: str | Path) -> HubId | None:
    """What `path` says as an id; None for what is here, or is a `Path`, or reads otherwise."""
    if not isinstance(path, str) or not (match := ID.fullmatch(path)):
        return None
    if path.endswith(NO_NAMES) or os.path.lexists(path) or os.path.isdir(path.split("/")[0]):
        return None
    return HubId(*match.groups())


def why_missing(path: str | Path) -> str:
    """What to do about a path that is not there."""
    home = str(path).split("/")[0]
    if isinstance(path, str) and ID.fullmatch(path) and os.path.isdir(home):
        return f"check the path: {home}/ is a folder here, so this is no id of the Hub"
    return "check the path"


def repository(path: str | None) -> str | None:
    """An id without its revision, which PEFT has no place for in a name; a path as it is."""
    wanted = None if path is None else hub_id(path)
    return path if wanted is None else wanted.id


def local_path(path: str | Path) -> Path:
    """`path` as it is, or for a Hub id the folder of its snapshot, downloaded if need be.

    A line on stderr says before a download which commit, how many files, how large and whereto.

    Raises:
      InputError: HUB-PACKAGE (huggingface_hub is not installed), HUB-OFFLINE (no network, and not
        in the cache), HUB-MISSING, HUB-GATED, HUB-REVISION, HUB-FILES (it holds no model that is
        read here), HUB-READ (anything else that the Hub or the download says).
    """
    wanted = hub_id(path)
    return Path(path) if wanted is None else snapshot(wanted)


@functools.cache
def snapshot(wanted: HubId) -> Path:
    """The folder of a snapshot in Hugging Face's cache; asked for once in a process."""
    try:
        import huggingface_hub as hub
    except ImportError:
        found = "is no path here; as an id of the Hub it needs huggingface_hub"
        hint = "pip install 'qlora-jax[hub]'"
        raise InputError("HUB-PACKAGE", str(wanted), found, "a path", hint) from None
    try:
        # Lists names and sizes, and fetches nothing.
        files = hub.snapshot_download(wanted.id, revision=wanted.revision, dry_run=True)
    except Exception as error:
        return cached(hub, wanted, error.__cause__ or error)
    names = needed(wanted, [file.filename for file in files])
    chosen = [file for file in files if file.filename in names]
    new = [file for file in chosen if file.will_download]
    commit = chosen[0].commit_hash
    if new:
        size = sum(file.file_size or 0 for file in new) / 1e9
        count = "1 file" if len(new) == 1 else f"{len(new)} files"
        home = hub.constants.HF_HUB_CACHE
        tell(f"download   {wanted}, commit {commit[:8]}: {count}, {size:.3g} GB, to {home}")
    try:
        folder = hub.snapshot_download(wanted.id, revision=commit, allow_patterns=names)
    except Exception as error:
        refuse_answers(wanted, error)
        raise unreadable(wanted, error, "run it again: what has arrived is kept") from error
    return Path(folder)


def cached(hub: Any, wanted: HubId, error: BaseException) -> Path:
    """The snapshot in the cache when the Hub is out of reach; what else it says is an error."""
    refuse_answers(wanted, error)
    found = hub.try_to_load_from_cache(wanted.id, "config.json", revision=wanted.revision)
    if isinstance(found, str):
        tell(f"offline    {wanted} is taken from the cache: {Path(found).parent}")
        return Path(found).parent
    if getattr(error, "response", None) is not None:
        raise unreadable(wanted, error, "the same again later") from error
    what = "is no path here, the Hub is out of reach, and the cache does not hold it"
    reason = in_one_line(error)
    hint = "the path of a model's folder, or a network"
    raise InputError("HUB-OFFLINE", str(wanted), f"{what}: {reason}", hint=hint) from error


def refuse_answers(wanted: HubId, error: BaseException) -> None:
    """What the Hub itself answered about the model, as an error of ours."""
    for kind in type(error).__mro__:  # by name, in this order: what is gated is also not found
        if kind.__name__ in ANSWERS:
            code, found, hint = ANSWERS[kind.__name__]
            raise InputError(code, str(wanted), found, hint=hint.format(id=wanted.id)) from error


def unreadable(wanted: HubId, error: BaseException, hint: str) -> InputError:
    """The error for all else that huggingface_hub raises, a full disk too."""
    found = f"the Hub cannot be read: {type(error).__name__}: {in_one_line(error)}"
    return InputError("HUB-READ", str(wanted), found, hint=hint)


def in_one_line(error: BaseException) -> str:
    """The text of an error, which may have paragraphs."""
    return " ".join(str(error).split())


def tell(line: str) -> None:
    """On stderr, so that what a command prints stays what it found."""
    print(line, file=sys.stderr, flush=True)


def needed(wanted: HubId, names: Sequence[str]) -> list[str]:
    """The files of a repository that a model is opened with.

    Raises:
      InputError: HUB-FILES, naming what is there instead.
    """
    weights = weights_of(names)
    if "config.json" in names and weights:
        beside = ("config.json", *OTHERS, *TOKENIZER)
        return [name for name in beside if name in names] + weights
    where, expected = str(wanted), "config.json and safetensors"
    if "adapter_config.json" in names:
        found, hint = "is an adapter, not a model", f"hf download {wanted.id} --local-dir adapter"
        raise InputError("HUB-FILES", where, found, expected, hint)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        found = f"holds GGUF files alone: {listed(ggufs)}"
        hint = f"hf download {wanted.id} {ggufs[0]} --local-dir ., then that file's path"
        raise InputError("HUB-FILES", where, found, expected, hint)
    raise InputError("HUB-FILES", where, f"holds no model: {listed(names)}", expected)


def weights_of(names: Sequence[str]) -> list[str]:
    """One file, or an index and its shards: safetensors if there are any, else pickles."""
    for single, index, shard in WEIGHTS:
        if single in names:
            return [single]
        if index in names:
            return [index, *(name for name in names if shard.fullmatch(name))]
    return []

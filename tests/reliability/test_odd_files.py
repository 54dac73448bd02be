"""R23: names and links that lead elsewhere, pipes and devices are refused before being opened."""

import os
from pathlib import Path

import pytest

from tests.checkpoints.safetensors_files import index
from tests.checkpoints.test_shards import BAD_NAMES
from tests.reliability import clean

RULE = "R23"
SECONDS = 0.1


def link_out(path: Path) -> None:
    target = path.parent.parent / f"outside-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


ACTS = [link_out, loop, pipe, device, folder, nothing]
SHARD = "model-00002-of-00002.safetensors"
PLACES = {
    "weights": (clean.model, ["config.json", "model.safetensors"]),
    "weights in shards": (clean.sharded, ["model.safetensors.index.json", SHARD]),
    "weights in GGUF": (clean.gguf_model, ["model.gguf"]),
    "adapter": (clean.adapter, ["adapter_config.json", "adapter_model.safetensors"]),
    "tokenizer": (clean.tokenizer, ["tokenizer.json", "tokenizer_config.json"]),
    "orbax": (clean.orbax, ["manifest.json"]),
}
# A GGUF file is named by the user, who may well link to it: its name is not a stranger's.
ALLOWED = {("weights in GGUF", link_out), ("weights in GGUF", device)}


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_is_none(place, tmp_path, worker_of, record_property):
    write, names = PLACES[place]
    pristine, wrong, seconds = write(tmp_path / "clean"), [], [0.0]
    cases = [(name, act) for name in names for act in ACTS if (place, act) not in ALLOWED]
    worker = worker_of(place.split()[0])
    worker.learn(pristine)
    for number, (name, act) in enumerate(cases):
        spoiled = write(tmp_path / str(number) / "case")
        act(spoiled / name)
        report = worker.load(spoiled)
        seconds.append(report.seconds)
        if report.outcome != "refused" or report.exit_code not in (2, 5) or report.outside:
            wrong.append((name, act.__name__, report))
    record_property("cases", len(cases))
    record_property("passed", len(cases) - len(wrong))
    record_property("slowest_seconds", max(seconds))
    assert wrong == []
    assert max(seconds) < SECONDS


def test_a_name_that_is_none(tmp_path, worker_of, record_property):
    pristine, wrong, seconds = clean.sharded(tmp_path / "clean"), [], []
    (tmp_path / "secret.safetensors").write_bytes((pristine / SHARD).read_bytes())
    spoiled = clean.sharded(tmp_path / "case")
    twins = index({"a": "model.safetensors", "b": "MODEL.safetensors"})
    worker = worker_of("weights")
    worker.learn(pristine)
    for name in [*BAD_NAMES, "a twin of another case"]:
        content = twins if name == "a twin of another case" else index({"a": name})
        (spoiled / "model.safetensors.index.json").write_bytes(content)
        report = worker.load(spoiled)
        seconds.append(report.seconds)
        if report.code not in ("IX-NAME", "IX-CASE") or report.outside:
            wrong.append((name, report))
    record_property("cases", len(BAD_NAMES) + 1)
    record_property("passed", len(BAD_NAMES) + 1 - len(wrong))
    record_property("slowest_seconds", max(seconds))
    assert wrong == []
    assert max(seconds) < SECONDS


@pytest.mark.parametrize(
    ("loader", "write"),
    [("weights", clean.model), ("weights", clean.sharded), ("tokenizer", clean.tokenizer)],
    ids=["weights", "shards", "tokenizer"],
)
def test_links_of_hugging_faces_cache_are_followed(
    loader, write, tmp_path, worker_of, record_property
):
    plain = write(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    worker = worker_of(loader)
    reference = worker.learn(plain)
    report = worker.load(snapshot)
    record_property("slowest_seconds", report.seconds)
    assert report.outcome == "loaded", report
    assert report.values.keys() == reference.values.keys()

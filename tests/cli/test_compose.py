"""qlora-jax compose: adapters and weights in, one adapter and its origin out, or one line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.compose import compose
from qlora_jax.cli.compose import weighted
from qlora_jax.cli.main import main
from qlora_jax.errors import InputError
from qlora_jax.workflows.adapter_folder import load_adapter, save_adapter
from qlora_jax.workflows.open import load
from tests.tiny_model import write_tiny_model
from tests.trained import trained

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, adapters `a` (r 4, with a tokenizer), `b` (r 2) and `a=1` (r 4), and a text."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model")
    model, tokenizer = load(folder / "model", dtype="float32")
    save_adapter(folder / "a", trained(model, 1, r=4), model, tokenizer)
    save_adapter(folder / "b", trained(model, 2, r=2, targets=["q_proj", "up_proj"]), model)
    save_adapter(folder / "a=1", trained(model, 3, r=4), model)
    (folder / "text.txt").write_text("to be or not to be, that is the question: " * 12)
    return folder, model


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A copy of it as the current folder, and the model."""
    shutil.copytree(home[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return home[1]


def run(*argv: str) -> int:
    return main(["compose", *argv, "--model", "model"])


def same(one: Adapter, other: Adapter) -> bool:
    leaves = jax.tree.map(np.array_equal, one.params, other.params)
    return one.spec == other.spec and all(jax.tree.leaves(leaves))


def composed(folder: str) -> dict:
    """What qlora_jax.json says."""
    return json.loads((Path(folder) / "qlora_jax.json").read_text())["composition"]


def test_what_is_written_is_the_composition_and_says_how_it_was_made(here, capsys):
    assert run("a=0.7", "b=-0.4", "-o", "out", "--method", "svd", "--energy", "0.9") == 0
    said = capsys.readouterr().out
    assert "nf4, as a was trained" in said
    assert "a: weight 0.7, rank 4" in said
    adapters = {name: load_adapter(name, here) for name in "ab"}
    expected = compose(adapters, {"a": 0.7, "b": -0.4}, method="svd", energy=0.9)
    assert same(load_adapter("out", here), expected)
    found = composed("out")
    assert (found["method"], found["energy"]) == ("svd", 0.9)
    for entry, (path, weight) in zip(found["adapters"], {"a": 0.7, "b": -0.4}.items(), strict=True):
        assert (entry["path"], entry["weight"]) == (path, weight)
        assert entry["sha256"] == hashlib.sha256(Path(path, TENSORS).read_bytes()).hexdigest()
    assert Path("out/tokenizer.json").read_bytes() == Path("a/tokenizer.json").read_bytes()
    assert main(["inspect", "out"]) == 0
    said = capsys.readouterr().out
    assert "  composition:\n" in said
    assert "method: svd" in said
    assert f"path=b sha256={found['adapters'][1]['sha256']} weight=-0.4" in said


def test_weights_are_1_where_none_is_given(here):
    assert run("a", "b", "-o", "out") == 0
    adapters = {name: load_adapter(name, here) for name in "ab"}
    assert same(load_adapter("out", here), compose(adapters, {"a": 1, "b": 1}))
    assert [entry["weight"] for entry in composed("out")["adapters"]] == [1, 1]


def test_density_has_a_default_that_is_told(here, capsys):
    assert run("a", "a=1=1", "-o", "out", "--method", "dare_ties", "--seed", "7") == 0
    assert "density 0.5, sign total, seed 7" in capsys.readouterr().out
    assert {"density": 0.5, "sign": "total", "seed": 7}.items() <= composed("out").items()
    adapters = {name: load_adapter(name, here) for name in ("a", "a=1")}
    expected = compose(adapters, {"a": 1, "a=1": 1}, method="dare_ties", seed=7)
    assert same(load_adapter("out", here), expected)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a", "a", None),
        ("a=0.5", "a", 0.5),
        ("a=-1e-2", "a", -0.01),
        ("a=1", "a", 1.0),  # `a` is there too
        ("a=1=2", "a=1", 2.0),
        ("only=3", "only=3", None),  # `only` is not there
        ("x/only=y/z", "x/only=y/z", None),
    ],
)
def test_a_path_may_hold_the_sign(tmp_path, monkeypatch, text, path, weight):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "a=1", "only=3", "x/only=y/z"):
        Path(folder).mkdir(parents=True)
    assert list(weighted([text])) == [(path, weight)]


def test_a_weight_that_is_no_number_is_told_with_the_argument():
    with pytest.raises(InputError, match=r"COMPOSE-WEIGHT\]: a=b=c: the weight is 'c'"):
        list(weighted(["a=b=c"]))


def test_weights_are_fitted_and_the_table_is_kept(here, capsys):
    assert run("a", "b", "-o", "out", "--fit", "text.txt", "--seq-len", "32") == 0
    said = capsys.readouterr().out
    rows = [line.split()[0] for line in said.splitlines() if line.startswith(" " * 11)]
    assert rows == ["on", "base", "a", "b", "uniform,", "fitted"]
    found = composed("out")
    assert found["fit"]["loss"].keys() == {"base", "a", "b", "uniform, 1/2 each", "fitted"}
    digest = hashlib.sha256(Path("text.txt").read_bytes()).hexdigest()
    assert (found["fit"]["data"], found["fit"]["sha256"]) == ("text.txt", digest)
    weights = {entry["path"]: entry["weight"] for entry in found["adapters"]}
    assert min(weights.values()) >= 0
    adapters = {name: load_adapter(name, here) for name in "ab"}
    assert same(load_adapter("out", here), compose(adapters, weights))


def test_a_weight_a_layer_is_fitted_from_those_given(here, capsys):
    options = ["--fit", "text.txt", "--fit-per-layer", "--free", "--seq-len", "32"]
    assert run("a=0.2", "b", "-o", "out", *options, "--fit-tokens", "64") == 0
    assert "weights as given" in capsys.readouterr().out
    found = composed("out")
    assert [len(entry["weight"]) for entry in found["adapters"]] == [2, 2]
    assert found["fit"]["fitted_on_tokens"] == 2 * 31


def leave() -> None:
    """Nothing is wrong with the files."""


def said(folder: str, **facts) -> Callable[[], None]:
    """A qlora_jax.json with other facts."""

    def change() -> None:
        path = Path(folder) / "qlora_jax.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return change


def of_another_base() -> None:
    for folder in ("a", "b"):
        said(folder, base="0" * 64)()


def poisoned() -> None:
    arrays = load_file(f"b/{TENSORS}")
    name = next(name for name in arrays if "lora_B" in name)
    arrays[name] = arrays[name].copy()
    arrays[name][1, 1] = np.nan
    save_file(arrays, f"b/{TENSORS}")


def narrower() -> None:
    arrays = load_file(f"b/{TENSORS}")
    save_file(
        {n: a[:, :-1].copy() if "lora_A" in n else a for n, a in arrays.items()}, f"b/{TENSORS}"
    )


def rank_0() -> None:
    path = Path("b/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 0}))


BAD = {
    "other bases": (said("b", base="0" * 64), "a b", ("COMPOSE-BASE", "b: ", "the same base")),
    "another base": (of_another_base, "a b", ("PEFT-BASE", "another base", "000000000000")),
    "no adapter there": (leave, "a=1 nowhere=1", ("missing adapter", "nowhere")),
    "weight NaN": (leave, "a=nan b=1", ("COMPOSE-WEIGHT", "a=nan", "nan (expected a finite")),
    "weight infinite": (leave, "a=-inf b=1", ("COMPOSE-WEIGHT", "-inf")),
    "weight text": (leave, "a=x b=1", ("COMPOSE-WEIGHT", "'x'", "a number")),
    "twice": (leave, "a=1 a=2", ("COMPOSE-TWICE", "a: comes twice")),
    "NaN in an adapter": (poisoned, "a b", ("nan", "finite", "lora_B", f"b/{TENSORS}")),
    "adapter of another model": (narrower, "a b", ("PEFT-SHAPE", "(2, 64)", f"b/{TENSORS}")),
    "rank 0 in an adapter": (rank_0, "a b", ("LORA-RANK", "r: 0", "1 to 4096")),
    "rank 0": (leave, "a b --method svd --svd-rank 0", ("LORA-RANK", "svd_rank: 0", "1 to 4096")),
    "energy": (leave, "a b --method svd --energy 2", ("energy: 2.0", "at most 1")),
    "density": (leave, "a b --method ties --density 1.5", ("density: 1.5", "over 0, at most 1")),
    "density NaN": (leave, "a b --method ties --density nan", ("density: nan",)),
    "unused": (leave, "a b --density 0.5", ("density: has no effect with method cat",)),
    "unequal ranks": (leave, "a b --method linear", ("COMPOSE-RANK", "a 4, b 2", "cat", "svd")),
    "method": (leave, "a b --method tie", ("unknown 'tie'", "Try: ties")),
    "fit with another method": (
        leave,
        "a b --fit text.txt --method linear",
        ("COMPOSE-FIT", "method linear (expected method cat)"),
    ),
    "free without fit": (leave, "a b --free", ("--free: has no effect without --fit",)),
    "negative start": (leave, "a=-1 b --fit text.txt", ("FIT-START", "-1", "--free")),
    "no text to fit on": (leave, "a b --fit no.txt", ("DATA-MISSING", "no.txt")),
    "too little text": (
        lambda: Path("text.txt").write_text("to be"),
        "a b --fit text.txt",
        ("EVAL-WINDOW", "5 tokens"),
    ),
}


def files() -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, here, capsys):
    spoil, argv, words = BAD[case]
    spoil()
    before = files()
    code = run(*argv.split(), "-o", "out")
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error[")
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert files() == before


def test_an_output_that_exists_is_refused_before_anything_is_read(here, capsys):
    before = files()
    assert main(["compose", "a", "b", "-o", "b", "--model", "nowhere"]) == 2
    assert "OUT-EXISTS" in capsys.readouterr().err
    assert files() == before


def test_another_base_can_be_taken_all_the_same(here):
    said("b", base="0" * 64)()
    assert run("a", "b", "-o", "out", "--any-base") == 0

"""A plan: what always holds of one, what it chooses, what it says when nothing fits."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest

from qlora_jax import process
from qlora_jax.cli.main import main
from qlora_jax.errors import InputError
from qlora_jax.memory import budget
from qlora_jax.memory.budget import Budget
from qlora_jax.memory.liveness import peak_bytes
from qlora_jax.memory.planner import plan
from qlora_jax.memory.program import kept_bytes, traced
from qlora_jax.models.config import ModelConfig
from qlora_jax.train.config import TrainConfig
from tests.tiers import tiered

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SHAPE = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
)
KEYS = {
    *("fits", "device_bytes", "host_bytes", "by_owner", "compiled", "step_seconds_bound"),
    *("bottleneck", "changes", "gpu", "limits", "choices"),
}


@functools.cache
def planned(gpu: str = "1TB", **settings):
    settings = {"lora_r": 8, "max_seq_length": 512, **settings}
    return plan(SHAPE, TrainConfig(**settings), budget.of_absent(gpu))


def test_owners_add_up():
    found = planned()
    assert sum(found.estimate.device.values()) == found.device_bytes
    assert sum(found.estimate.host.values()) == found.host_bytes
    assert all(
        size >= 0 for size in [*found.estimate.device.values(), *found.estimate.host.values()]
    )


@pytest.mark.parametrize(
    ("less", "more"),
    tiered(
        [
            ({"max_seq_length": 256}, {"max_seq_length": 1024}),
            ({"batch_size": 1}, {"batch_size": 4}),
            ({"lora_r": 4}, {"lora_r": 64}),
            ({"optim": "paged_adamw_8bit"}, {"optim": "paged_adamw_32bit"}),
            ({"load_in_4bit": True}, {"load_in_4bit": False}),
            ({"gradient_checkpointing": "full"}, {"gradient_checkpointing": "none"}),
            ({"gradient_checkpointing": "offload"}, {"gradient_checkpointing": "full"}),
            ({"stream_weights": "on"}, {"stream_weights": "off"}),
            ({"optim_memory": "host"}, {"optim_memory": "device"}),
        ],
        [
            ({"lora_r": 4}, {"lora_r": 64}),
            ({"gradient_checkpointing": "full"}, {"gradient_checkpointing": "none"}),
        ],
    ),
)
def test_more_never_needs_less(less, more):
    settings = {"gradient_checkpointing": "full", "stream_weights": "off"}
    assert (
        planned(**{**settings, **less}).device_bytes < planned(**{**settings, **more}).device_bytes
    )


def test_auto_is_the_quickest_way_that_fits():
    largest = planned()
    assert dataclasses.astuple(largest.choices) == ("off", "none", "device", 0)
    assert largest.fits
    sizes = [largest.device_bytes, *(largest.device_bytes // part for part in (2, 3))]
    streamed = {"off": 0, "on": 1, "all": 2, "disk": 3}
    order = [planned(f"{size / 1e9:.6f}GB") for size in sizes]
    assert all(found.fits for found in order)
    assert all(found.device_bytes <= found.budget.device for found in order)
    ranks = [streamed[found.choices.stream_weights] for found in order]
    assert ranks == sorted(ranks)
    assert order[-1].choices.gradient_checkpointing != "none"


def test_what_was_asked_for_is_what_is_planned():
    found = planned(stream_weights="all", gradient_checkpointing="offload", optim_memory="host")
    assert dataclasses.astuple(found.choices) == ("all", "offload", "host", 0)
    assert set(found.reasons.values()) == {"asked for"}
    assert found.estimate.device["base"] < 1e5  # norms and nothing else
    assert found.estimate.host["optimizer"] > 0
    assert found.estimate.host["activations"] == 40 * 512 * 512 * 2


def test_the_bound_names_what_is_busiest():
    streamed = {"stream_weights": "on", "gradient_checkpointing": "full"}
    short, long = (
        planned("rtx4090", max_seq_length=length, **streamed).bound for length in (128, 8192)
    )
    assert short.step_seconds == max(short.seconds.values()) == short.seconds[short.bottleneck]
    assert (short.bottleneck, long.bottleneck) == ("link", "compute")
    assert 128 < short.hidden_from < 8192
    assert planned("24GB").bound is None


def test_what_fits_nowhere_says_what_would():
    settings = {"gradient_checkpointing": "none", "optim_memory": "device", "lora_r": 64}
    found = planned("100MB", stream_weights="off", **settings)
    assert not found.fits
    said = [change.change for change in found.changes]
    assert said.index("optim_memory=host") < said.index("gradient_checkpointing=full")
    assert said.index("gradient_checkpointing=full") < said.index("stream_weights=on")
    assert said[-1].startswith("--gpu ")
    assert all(c.saves_device_bytes > 0 or c.saves_host_bytes > 0 for c in found.changes)
    assert "it does not fit. What would help, the cheapest first:" in found.table()
    saved = next(c for c in found.changes if c.change == "stream_weights=on").saves_device_bytes
    really = planned("100MB", stream_weights="on", **settings)
    assert abs(found.device_bytes - saved - really.device_bytes) < 0.2 * found.device_bytes


def test_a_cpu_shares_one_memory():
    def limits(size):
        return Budget("cpu", size, None, "a test", None)

    config = TrainConfig(lora_r=8, max_seq_length=512)
    found = plan(SHAPE, config, limits(10**12))
    both = found.device_bytes + found.host_bytes
    assert plan(SHAPE, config.replace(gradient_checkpointing="none"), limits(both)).fits
    tight = plan(SHAPE, config, limits(both - 1))
    assert tight.choices.gradient_checkpointing != "none"
    assert tight.choices.stream_weights == "off"


def test_no_array_is_made():
    before = {id(array) for array in jax.live_arrays()}
    planned("rtx4090", stream_weights="on")
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in new) < 1e6


@pytest.mark.parametrize("remat", tiered(["none", "save-attention"], ["save-attention"]))
def test_what_a_layer_keeps_is_in_the_step_of_a_gpu(remat):
    """It is counted without the GPU's kernels, and the whole step with them."""
    found = planned(gradient_checkpointing=remat, stream_weights="off")
    kept = 40 * kept_bytes(found.micro)[remat]
    step, full = (
        peak_bytes(traced(found.micro, "off", policy), [jax.memory.Space.Device]).nbytes
        for policy in (remat, "full")
    )
    more = kept - 40 * found.micro.input_bytes
    assert abs(step - full - more) < 0.15 * kept


def test_a_length_that_the_model_has_no_positions_for_is_refused():
    with pytest.raises(InputError, match="RUN-LENGTH"):
        planned(max_seq_length=9000)


@pytest.mark.parametrize("path", tiered(RECIPES, RECIPES[:1]), ids=lambda p: p.name)
def test_every_recipe_is_planned(path, capsys):
    shapes = [f"model={ROOT / 'configs' / 'shapes' / 'llama3.1-8b'}"]
    known = "shapes/" in path.read_text()
    assert main(["plan", str(path), *([] if known else shapes), "--gpu", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() >= KEYS
    assert found["fits"]
    owners = found["by_owner"].values()
    assert sum(owner["device"] for owner in owners) == found["device_bytes"]
    assert sum(owner["host"] for owner in owners) == found["host_bytes"]


def test_a_table_for_people(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {ROOT / 'configs' / 'shapes' / 'llama3.1-8b'}\nlora_r: 8\n")
    assert main(["plan", str(path), "--gpu", "rtx4090", "max_seq_length=256"]) == 0
    out = capsys.readouterr().out
    assert "it fits" in out
    assert "stream_weights=off (auto: the quickest way" in out
    assert main(["plan", str(path), "--gpu", "rtx409"]) == 2
    assert "GPU-NAME" in capsys.readouterr().err


def test_a_limit_of_the_address_space_bounds_what_there_is(monkeypatch):
    free, _ = process.available()
    used = process.address_space()
    monkeypatch.setattr(process.resource, "getrlimit", lambda _: (used + 10**6, used + 10**6))
    assert process.available()[0] <= 10**6 < free

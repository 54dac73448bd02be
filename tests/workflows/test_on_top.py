"""An adapter on top of another: what trains, what stays, what is remembered, what is asked for."""

import json

import jax
import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.compose import compose
from qlora_jax.adapters.init import init_lora
from qlora_jax.adapters.on_top import on_top
from qlora_jax.cli.main import main
from qlora_jax.errors import InputError
from qlora_jax.evaluation.perplexity import batch_loss
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.step import gradients
from qlora_jax.workflows.adapter_folder import load_adapter, save_adapter
from qlora_jax.workflows.below import Below
from qlora_jax.workflows.planning import planned
from qlora_jax.workflows.trainer import Trainer
from tests.tolerances import LOGITS_ATOL, TRAINING_LOSS_RTOL
from tests.trained import trained
from tests.workflows import runs

IDS = np.arange(3, 51, dtype=np.int32).reshape(2, 24)
UPPER = ["up_proj", "down_proj"]
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(scope="module")
def base(opened):
    return opened[0]


@pytest.fixture(scope="module")
def below(base):
    uneven = {"model.layers.0.self_attn.q_proj": 1}
    return trained(base, 1, r=3, targets=["q_proj", "up_proj"], rank_pattern=uneven)


@pytest.fixture(scope="module")
def lora(base):
    return trained(base, 2, r=2, targets=["q_proj", "layers.1.mlp.down_proj"])


@pytest.mark.slow
def test_both_are_the_sum_that_cat_makes(base, below, lora):
    both = compose({"below": below, "lora": lora}, {"below": 1, "lora": 1})
    expected = base(IDS, adapter=both)
    np.testing.assert_allclose(base(IDS, adapter=on_top(below, lora)), expected, atol=LOGITS_ATOL)
    assert np.abs(expected - base(IDS, adapter=lora)).max() > 100 * LOGITS_ATOL


def test_the_gradient_is_that_of_the_upper_adapter_alone(base, below, lora):
    sums = gradients(lora.params, base, BATCH, spec=lora.spec, frozen=below)
    assert jax.tree.structure(sums.grads) == jax.tree.structure(lora.params)

    def whole(params):
        both = compose(
            {"below": below, "lora": Adapter(params, lora.spec)}, {"below": 1, "lora": 1}
        )
        return float(batch_loss(both.params, base, BATCH, spec=both.spec)[0])

    for name in lora.params:
        at = (1, 0, 0)
        step = np.zeros(lora.params[name]["A"].shape, np.float32)
        step[at] = 0.05
        up, down = (
            whole({**lora.params, name: {**lora.params[name], "A": lora.params[name]["A"] + move}})
            for move in (step, -step)
        )
        found = float(sums.grads[name]["A"][at])
        np.testing.assert_allclose(found, (up - down) / 0.1, rtol=0.05, atol=5e-3)


@pytest.fixture(scope="module")
def sequence(home, base, below, tmp_path_factory):
    """`a` as saved, and a finished run `b` on top of it."""
    folder = tmp_path_factory.mktemp("sequence")
    save_adapter(folder / "a", below, base)
    settings = {"max_steps": 3, "frozen_adapters": [str(folder / "a")], "save_steps": 2}
    run = runs.trainer(home, folder / "b", target_modules=UPPER, **settings)
    return folder, run, run.fit()


def test_the_lower_adapter_stays_and_the_upper_learns(sequence, home, base, below):
    _, run, done = sequence
    assert jax.tree.all(jax.tree.map(np.array_equal, run.below.adapter, one_scale(below)))
    assert any(np.any(pair["B"]) for pair in done.lora.params.values())
    assert not set(done.lora.spec.targets) <= set(below.spec.targets)
    losses = [row["loss"] for row in done.metrics]
    assert losses[-1] < losses[0]
    first = run.batches.inputs(next(run.batches.groups(0, 0))[0])

    def loss_with(params, spec):
        total, count = batch_loss(params, base, first, spec=spec)
        return float(total / count)

    assert losses[0] == pytest.approx(loss_with(below.params, below.spec), rel=TRAINING_LOSS_RTOL)
    assert abs(losses[0] - loss_with({}, None)) > 1e-4, "the base alone has another loss"


def test_the_plan_counts_what_lies_below(sequence, home, below):
    """Before the model is loaded, from the folder; and of a model that is there."""
    folder, run, _ = sequence
    alone = runs.trainer(home, folder / "alone", target_modules=UPPER, max_steps=1)
    early = planned(run.config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one_scale(below)))
    for plan in (run.plan, early):
        assert plan.estimate.device["adapter"] == alone.plan.estimate.device["adapter"] + size
    assert early.micro.frozen == run.below.adapter.spec
    more = early.estimate.device["workspace"] + early.estimate.device["activations"]
    one = planned(alone.config).estimate.device
    assert more > one["workspace"] + one["activations"], "both are joined in the step"


def one_scale(adapter: Adapter) -> Adapter:
    return compose({"a": adapter}, {"a": 1})


def test_what_lies_below_is_remembered_and_asked_for(sequence, base, capsys):
    folder, _, done = sequence
    facts = json.loads((folder / "b" / "qlora_jax.json").read_text())
    assert facts["on_top_of"][0]["path"] == str(folder / "a")
    with pytest.raises(InputError, match=r"PEFT-BELOW\]: .*/b: was trained on top of .*/a: alone"):
        load_adapter(folder / "b", base)
    beside = load_adapter(folder / "b", base, beside=[folder / "a"])
    np.testing.assert_array_equal(
        beside.params["mlp.up_proj"]["A"], done.lora.params["mlp.up_proj"]["A"]
    )
    assert load_adapter(folder / "b", base, any_base=True).spec == beside.spec
    # Another adapter under the same name is not the one.
    save_adapter(folder / "c", trained(base, 5, r=2), base)
    with pytest.raises(InputError, match="PEFT-BELOW"):
        load_adapter(folder / "b", base, beside=[folder / "c"])


def test_compose_makes_the_adapter_that_equals_both(sequence, home, base, below, tmp_path, capsys):
    folder, _, done = sequence
    model, a, b = (str(path) for path in (home / "model", folder / "a", folder / "b"))
    arguments = ["compose", a, b, "--model", model, "-o", str(tmp_path / "both")]
    assert main(arguments) == 0
    both = load_adapter(tmp_path / "both", base)
    expected = base(IDS, adapter=on_top(below, done.lora))
    np.testing.assert_allclose(base(IDS, adapter=both), expected, atol=LOGITS_ATOL)
    capsys.readouterr()
    for argv in (
        ["compose", b, "--model", model, "-o", str(tmp_path / "alone")],
        ["merge", b, str(tmp_path / "merged"), "--model", model],
        ["generate", model, "--adapter", b, "--prompt", "a"],
        ["export", b, str(tmp_path / "peft"), "--format", "peft", "--model", model],
    ):
        assert main(argv) == 2
        assert "qlora-jax compose" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def test_a_resumed_run_knows_what_it_was_on_top_of(sequence, home, base, tmp_path):
    folder, _, done = sequence
    settings = {"frozen_adapters": [str(folder / "a")], "target_modules": UPPER, "save_steps": 2}
    runs.trainer(home, tmp_path / "b", **settings, max_steps=2).fit()
    again = runs.trainer(home, tmp_path / "b", **settings, max_steps=3).fit(resume="auto")
    for name, pair in done.lora.params.items():
        np.testing.assert_array_equal(again.lora.params[name]["B"], pair["B"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1 would drop inputs of the frozen"),
        ({"use_dora": True}, "use_dora: True has no sum"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.* has no sum"),
        ({"stream_weights": "disk"}, "stream_weights: 'disk' computes no frozen"),
    ],
)
def test_what_has_no_sum_is_refused_by_the_configuration(settings, words):
    with pytest.raises(InputError, match=rf"CFG-TOGETHER\]: {words}"):
        TrainConfig(frozen_adapters=["a"], **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"dropout": 0.1}, r"RUN-BELOW\]: lora_dropout"), ({"use_dora": True}, "COMPOSE-KIND")],
)
def test_and_by_the_trainer(base, below, settings, words, tmp_path):
    upper = init_lora(base, r=2, key=jax.random.key(0), **settings)
    config = TrainConfig(max_steps=1, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match=words):
        Trainer(base, upper, [BATCH], config, below=Below(below))

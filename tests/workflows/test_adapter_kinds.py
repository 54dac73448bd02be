"""Runs that train more than A and B: DoRA's lengths of rows, lm_head and embed_tokens in full."""

import jax
import numpy as np
import pytest

from qlora_jax.adapters.init import init_lora
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows.adapter_folder import load_adapter
from qlora_jax.workflows.header import adapted, header, millions
from qlora_jax.workflows.training import open_run
from tests.tiers import tiered
from tests.tiny_model import FEW_TARGETS
from tests.tolerances import NEW_ADAPTER_ATOL
from tests.workflows.runs import assert_same, quiet, trainer

KINDS = {
    "dora": {"use_dora": True},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "all": {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_is_saved_and_loaded(home, tmp_path, opened, kind):
    model, _ = opened
    begin = init_lora(
        model, r=4, alpha=8, targets=FEW_TARGETS, key=jax.random.key(0), **KINDS[kind]
    )
    run = trainer(home, tmp_path / "run", max_steps=15, **KINDS[kind]).fit()
    losses = [row["loss"] for row in run.metrics]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    loaded = load_adapter(tmp_path / "run", model)
    assert loaded.spec == begin.spec
    assert_same(loaded.params, run.lora.params)
    for name, arrays in begin.params.items():
        for key, first in arrays.items():
            assert np.any(run.lora.params[name][key] != first), f"{name}.{key} has not learned"


@pytest.mark.parametrize("kind", tiered(KINDS, ["all"]))
def test_a_new_adapter_of_any_kind_changes_nothing(opened, kind):
    model, _ = opened
    ids = np.arange(24, dtype=np.int32)[None]
    lora = init_lora(model, r=4, key=jax.random.key(0), **KINDS[kind])
    np.testing.assert_allclose(model(ids, adapter=lora), model(ids), atol=NEW_ADAPTER_ATOL)


def test_the_header_counts_all_that_is_trained(home, tmp_path, opened):
    model, _ = opened
    run = trainer(home, tmp_path / "run", **KINDS["all"])
    leaves = jax.tree.leaves(run.lora.params)
    text = adapted(model, run.lora)
    assert run.lora.num_parameters == sum(leaf.size for leaf in leaves)
    assert text.startswith(f"{millions(run.lora.num_parameters)} parameters (")
    assert text.endswith("r 4, scale alpha/r = 2, DoRA")
    assert any(line.split() == ["in", "full", "lm_head,", "embed_tokens"] for line in header(run))


def test_a_run_goes_on_from_an_adapter_of_any_kind(home, tmp_path):
    settings = {"max_steps": 2, **KINDS["all"]}
    first = trainer(home, tmp_path / "first", **settings).fit()
    own = {"adapter": tmp_path / "first", "dtype": "float32", "max_seq_length": 64}
    paths = {"model": home / "model", "dataset": home / "train.jsonl"}
    run = open_run(TrainConfig(output_dir=tmp_path / "next", **paths, **own), say=quiet)
    assert_same(run.lora.params, first.lora.params)
    assert run.lora.spec == first.lora.spec

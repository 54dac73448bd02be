"""Closer beginnings from files to files: a 4-bit folder and the adapter that belongs to it."""

import json

import jax
import numpy as np
import pytest

from qlora_jax.adapters.closer import Closer
from qlora_jax.adapters.init import init_lora
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import ConfigMismatch, InputError, Note
from qlora_jax.models.fingerprint import fingerprint
from qlora_jax.workflows.adapter_folder import load_adapter
from qlora_jax.workflows.closer import loftq, quantize_closer
from qlora_jax.workflows.convert import quantize_checkpoint
from qlora_jax.workflows.from_disk import open_from_disk
from qlora_jax.workflows.open import load
from qlora_jax.workflows.open_as_trained import open_as_trained
from qlora_jax.workflows.training import open_run
from tests.tiny_model import write_tiny_model
from tests.workflows import runs

HOWS = [Closer("pissa"), Closer("loftq"), Closer("loftq", iterations=4), Closer("pissa_niter_8")]
Q = "model.layers.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model")
    runs.write_rows(folder / "train.jsonl")
    quantize_checkpoint(folder / "model", folder / "plain")
    return folder


def relative(found, dense):
    return float(np.linalg.norm(found - dense) / np.linalg.norm(dense))


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.name}-{how.iterations}")
def test_base_and_adapter_together_are_near_the_model(home, tmp_path, how):
    settings = {
        "r": 8,
        "alpha": 4,
        "rank_pattern": {"layers.1.mlp.up_proj": 16},
        "targets": ["q_proj", "up_proj", "down_proj"],
        "use_rslora": True,
    }
    out = tmp_path / "out"
    report, has_tokenizer = quantize_closer(home / "model", out, how, dtype="float32", **settings)
    assert has_tokenizer
    dense, _ = load(home / "model", quantization=None, dtype="float32")
    model, _ = load(out, quantization=None, dtype="float32")
    lora = load_adapter(out / "adapter", model)
    assert lora.spec.ranks("mlp.up_proj") == (8, 16)
    assert lora.spec.lora_alpha == 4
    assert lora.spec.use_rslora
    measured = {error.name: error.relative_error for error in report.weights}
    alone = {error.name: error.relative_error for error in report.alone}
    assert len(measured) == 14
    for stacked, w in dense.weights().items():
        target = stacked.removeprefix("model.layers.").removesuffix(".weight")
        for layer in range(2) if target.count("proj") else ():
            base = np.asarray(model.weights()[stacked][layer].dequantize("float32"))
            name = f"model.layers.{layer}.{target}.weight"
            if target in lora.spec.targets:
                A, B = map(np.asarray, lora.layer(target, layer))
                base = base + lora.spec.scales(target)[layer] * (B @ A)
                assert measured[name] < 0.95 * alone[name]
            else:
                assert measured[name] == alone[name]
            found = relative(base, np.asarray(w[layer], np.float32))
            assert found == pytest.approx(measured[name], rel=1e-4)
    said = json.loads((out / "qlora_jax.json").read_text())["init"]
    assert said["relative_error"] == report.total.relative_error < said["relative_error_alone"]
    assert (said["name"], said["iterations"]) == (how.name, how.iterations)
    plain, own = ({n: Shards(f).read(n) for n in Shards(f).names()} for f in (home / "plain", out))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(plain[name], own[name]) == how.keeps_base


def test_the_adapter_knows_its_base(home, tmp_path):
    out = tmp_path / "out"
    quantize_closer(home / "model", out, Closer("pissa"), r=4)
    model, _ = load(out, quantization=None)
    saved = json.loads((out / "adapter" / "qlora_jax.json").read_text())
    assert saved["base"] == fingerprint(model)
    with Shards(out) as source:
        assert saved["base"] == fingerprint(open_from_disk(source, None, "bfloat16"))
    load_adapter(out / "adapter", model)
    other, _ = load(home / "model", quantization="nf4")
    with pytest.raises(ConfigMismatch, match="PEFT-BASE"):
        load_adapter(out / "adapter", other)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_the_same_bytes_again(home, tmp_path):
    outs = [tmp_path / name for name in "ab"]
    for out in outs:
        quantize_closer(home / "model", out, Closer("loftq_niter_4", 2, seed=7), r=4, report=True)
    for file in ("model.safetensors", "quantization.json", "adapter/adapter_model.safetensors"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()
    assert (outs[0] / "quantization.png").exists()


@pytest.mark.slow
def test_training_begins_with_it_and_goes_on_exactly(home, tmp_path):
    base = tmp_path / "base"
    quantize_closer(home / "model", base, Closer("pissa"), r=4)
    settings = {
        **{"model": str(base), "adapter": str(base / "adapter"), "dataset": home / "train.jsonl"},
        **{"max_seq_length": 64, "gradient_accumulation_steps": 1, "save_steps": 2},
        **{"learning_rate": 1e-3, "loraplus_lr_ratio": 4.0, "logging_steps": 1, "max_steps": 4},
    }

    def run(name, resume=None, **changes):
        config = runs.TrainConfig(**settings | changes, output_dir=str(tmp_path / name))
        trainer = open_run(config, resume=resume is not None, say=runs.quiet)
        return trainer.fit(resume=resume)

    whole = run("whole")
    run("parts", max_steps=2)
    run("parts", resume="auto")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)
    assert whole.lora.spec.r == 4
    with pytest.raises(ConfigMismatch, match=r"loraplus_lr_ratio 4\.0 -> 8\.0"):
        run("parts", resume="auto", loraplus_lr_ratio=8.0, max_steps=5)
    slow = run("slow", loraplus_lr_ratio=None, max_steps=3)
    assert slow.metrics[0]["loss"] == whole.metrics[0]["loss"]
    assert slow.metrics[-1]["loss"] != whole.metrics[2]["loss"]


def test_a_new_adapter_on_what_pissa_left_is_refused(home, tmp_path):
    base = tmp_path / "base"
    quantize_closer(home / "model", base, Closer("pissa"), r=4)
    with pytest.raises(InputError, match=r"INIT-RESIDUAL\].*Try: adapter=.*base/adapter\.$"):
        runs.trainer(home, tmp_path / "run", model=str(base))
    assert not (tmp_path / "run").exists()
    with pytest.warns(Note, match=r"is what PiSSA left of a model: .*only with .*base/adapter"):
        open_as_trained(base)
    open_as_trained(base, base / "adapter")


@pytest.mark.parametrize(("stream", "init"), [("off", "loftq"), ("on", "loftq_niter_2")])
def test_init_loftq_in_a_run_is_the_quantized_folders(home, tmp_path, stream, init):
    settings = {"use_rslora": True, "target_modules": "all-linear"}
    run = runs.trainer(home, tmp_path / "run", init=init, stream_weights=stream, **settings)
    quantize_closer(home / "model", tmp_path / "out", Closer(init), r=4, alpha=8, use_rslora=True)
    written = load_adapter(tmp_path / "out" / "adapter", run.model)
    assert written.spec == run.lora.spec
    for name, pair in written.params.items():
        for half in ("A", "B"):
            np.testing.assert_array_equal(run.lora.params[name][half], pair[half])


def test_loftq_of_a_base_whose_dense_weights_lie_elsewhere(home):
    model, _ = load(home / "plain", quantization=None, dtype="float32")
    dense, _ = load(home / "model", quantization=None, dtype="float32")
    fresh = init_lora(model, r=8, alpha=16, key=jax.random.key(0), modules_to_save=["lm_head"])
    lora = loftq(fresh, model, home / "model")
    assert lora.spec == fresh.spec
    np.testing.assert_array_equal(
        lora.params["lm_head"]["weight"], fresh.params["lm_head"]["weight"]
    )
    for layer in range(2):
        w = np.asarray(dense.weights()[Q][layer])
        kept = np.asarray(model.weights()[Q][layer].dequantize("float32"))
        A, B = map(np.asarray, lora.layer("self_attn.q_proj", layer))
        assert relative(kept + 2 * (B @ A), w) < 0.9 * relative(kept, w)


def test_what_loftq_cannot_look_at_is_said(home, tmp_path):
    model, _ = load(home / "plain", quantization=None)
    dense, _ = load(home / "model", quantization=None)
    key = jax.random.key(0)
    small = init_lora(model, r=4, key=key)
    for code, lora, base, path in [
        ("INIT-SOURCE", small, model, home / "plain"),
        ("INIT-DENSE", small, dense, home / "model"),
        ("INIT-DORA", init_lora(model, r=4, key=key, use_dora=True), model, home / "model"),
        ("INIT-RANK", init_lora(model, r=64, key=key), model, home / "model"),
    ]:
        with pytest.raises(InputError, match=code):
            loftq(lora, base, path)
    with pytest.raises(InputError, match=r"INIT-SOURCE\].*is 4-bit.*--init loftq"):
        runs.trainer(home, tmp_path / "run", model=str(home / "plain"), init="loftq")
    with pytest.raises(InputError, match=r"INIT-RANK\].*at most 32"):
        quantize_closer(home / "model", tmp_path / "out", Closer("pissa"), r=64)
    with pytest.raises(InputError, match="LORA-RANK"):
        quantize_closer(home / "model", tmp_path / "out", Closer("pissa"), r=0)
    with pytest.raises(InputError, match="W4-REQUANTIZE"):
        quantize_closer(home / "plain", tmp_path / "out", Closer("pissa"), r=4)
    with pytest.raises(InputError, match="OUT-EXISTS"):
        quantize_closer(home / "model", home / "plain", Closer("pissa"), r=4)
    assert list(tmp_path.iterdir()) == []

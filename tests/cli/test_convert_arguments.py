"""Wrong arguments of the converters: one line, exit code 2, no traceback, and nothing written."""

import subprocess
import sys

import pytest

from qlora_jax.cli.main import main
from qlora_jax.cli.options import byte_size
from tests.cli.converted import files, write_home

CASES = {
    # export: the format, and what it is of
    "export model out --format pft": ("EXPORT-FORMAT", "'pft'", "one of hf, bnb", "--format peft"),
    "export model out --format HF": ("EXPORT-FORMAT", "'HF'", "--format hf"),
    "export model out": ("CLI-ARGS", "--format"),
    "export model --format hf": ("CLI-ARGS", "out"),
    "export run out --format hf": ("EXPORT-KIND", "an adapter", "qlora-jax merge run OUT --model"),
    "export orbax-run out --format hf": ("EXPORT-KIND", "an adapter", "qlora-jax merge"),
    "export run out --format bnb-4bit": ("EXPORT-KIND", "an adapter", "qlora-jax merge"),
    "export run o.gguf --format gguf": ("EXPORT-KIND", "an adapter", "--format gguf-lora"),
    "export model out --format peft": ("EXPORT-KIND", "no adapter", "adapter_config.json"),
    "export model o.gguf --format gguf-lora": ("EXPORT-KIND", "no adapter", "--format gguf"),
    "export nowhere out --format peft": ("EXPORT-KIND", "missing adapter", "nowhere"),
    "export nowhere out --format hf": ("MODEL-MISSING", "nowhere", "Qwen/Qwen3-0.6B"),
    "export nowhere out --format bnb-4bit": ("MODEL-MISSING", "nowhere"),
    "export nowhere o.gguf --format gguf": ("MODEL-MISSING", "nowhere"),
    "export nowhere out --format orbax": ("MODEL-MISSING", "nowhere"),
    "export orbax-model out --format hf": ("EXPORT-ORBAX", "made from, model"),
    "export orbax-model out --format peft": ("EXPORT-ORBAX", "made from, model"),
    # --model
    "export run out --format peft": ("EXPORT-MODEL", "missing", "--model BASE"),
    "export run out --format orbax": ("EXPORT-MODEL", "missing"),
    "export run o.gguf --format gguf-lora": ("EXPORT-MODEL", "missing"),
    "export run out --format peft --model nowhere": ("MODEL-MISSING", "nowhere"),
    "export run out --format peft --model run": ("CFG-MISSING", "this is an adapter"),
    "export run o.gguf --format gguf-lora --model run": ("CFG-MISSING", "this is an adapter"),
    "export model out --format hf --model model": ("EXPORT-OPTION", "--model", "no use"),
    "export model out --format bnb-4bit --model model": ("EXPORT-OPTION", "--model", "no use"),
    "export model o.gguf --format gguf --model model": ("EXPORT-OPTION", "--model", "no use"),
    "export model out --format orbax --model model": ("EXPORT-OPTION", "--model", "no use"),
    # --dtype and --type
    "export model out --format hf --dtype float8": ("CLI-ARGS", "--dtype", "float8", "bfloat16"),
    "export run out --format peft --model model --dtype float16": ("EXPORT-OPTION", "--dtype"),
    "export run out --format orbax --model model --dtype float16": ("EXPORT-OPTION", "--dtype"),
    "export model o.gguf --format gguf --type q3_k": ("CLI-ARGS", "--type", "q3_k", "q8_0"),
    "export model out --format hf --type q8_0": ("EXPORT-OPTION", "--type", "q8_0"),
    "export model out --format bnb-4bit --type f16": ("EXPORT-OPTION", "--type"),
    "export model out --format orbax --type f16": ("EXPORT-OPTION", "--type"),
    "export run out --format peft --model model --type f16": ("EXPORT-OPTION", "--type"),
    "export model o.gguf --format gguf --type q8_0 --dtype float16": ("EXPORT-TYPE", "f16"),
    "export model o.gguf --format gguf --type f32 --dtype bfloat16": ("EXPORT-TYPE", "bf16"),
    # --shard-size
    "export model out --format hf --shard-size 2": ("CLI-ARGS", "'2'", "2GB or 500MB"),
    f"export model out --format hf --shard-size {'9' * 400}GB": ("CLI-ARGS", "15 digits"),
    "export model out --format hf --shard-size two": ("CLI-ARGS", "'two'", "2GB or 500MB"),
    "export model out --format hf --shard-size 0GB": ("CLI-ARGS", "'0GB'", "more than 0"),
    "export model out --format hf --shard-size -2GB": ("CLI-ARGS", "--shard-size"),
    "export model out --format hf --shard-size": ("CLI-ARGS", "--shard-size"),
    "export model o.gguf --format gguf --shard-size 1GB": ("EXPORT-OPTION", "--shard-size"),
    "export model out --format orbax --shard-size 1GB": ("EXPORT-OPTION", "--shard-size"),
    "export run out --format peft --model model --shard-size 1GB": ("EXPORT-OPTION",),
    "quantize model out --shard-size 1XB": ("CLI-ARGS", "'1XB'"),
    "merge run out --model model --shard-size 1XB": ("CLI-ARGS", "'1XB'"),
    # where it goes
    "export model run --format hf": ("OUT-EXISTS", "run"),
    "export model run --format bnb-4bit": ("OUT-EXISTS", "run"),
    "export model run --format orbax": ("OUT-EXISTS", "run"),
    "export run model --format peft --model model": ("OUT-EXISTS", "model"),
    "export model out --format gguf": ("out", ".gguf"),
    "export run out --format gguf-lora --model model": ("out", ".gguf"),
    "quantize model run": ("OUT-EXISTS", "run"),
    "merge run model --model model": ("OUT-EXISTS", "model"),
    # quantize
    "quantize model": ("CLI-ARGS", "out"),
    "quantize nowhere out": ("MODEL-MISSING", "nowhere"),
    "quantize model-4bit out": ("W4-REQUANTIZE", "quantized already"),
    "quantize run out": ("CFG-MISSING", "this is an adapter"),
    "quantize model out --kind nf3": ("CLI-ARGS", "nf3"),
    "quantize model out --block-size 48": ("48",),
    "quantize model out --dtype int8": ("CLI-ARGS", "int8"),
    # merge
    "merge run out": ("CLI-ARGS", "--model"),
    "merge run --model model": ("CLI-ARGS", "out"),
    "merge nowhere out --model model": ("PEFT-FOLDER", "nowhere"),
    "merge model out --model model": ("PEFT-FOLDER", "model"),
    "merge run out --model nowhere": ("MODEL-MISSING", "nowhere"),
    "merge run out --model run": ("CFG-MISSING", "this is an adapter"),
    "merge run out --model model --base quantized": ("CLI-ARGS", "quantized", "original"),
    "merge run out --model model --dtype double": ("CLI-ARGS", "double"),
    "merge run out --model model --tolerance 0": ("MERGE-TOLERANCE", "0"),
    "merge run out --model model --tolerance nan": ("MERGE-TOLERANCE", "nan"),
    "merge run out --model model-4bit --base original": ("MERGE-ORIGINAL", "model-4bit", "--base"),
    "merge run out --model model --perplexity-tolerance -1": ("MERGE-TOLERANCE", "-1"),
    "merge run out --model model --text nowhere.txt": ("DATA-MISSING", "nowhere.txt"),
    # merge into 4 bits
    "merge run out --model model --bits 8": ("CLI-ARGS", "--bits", "8"),
    "merge run out --model model --bits 4 --method gptq": ("CLI-ARGS", "'gptq'", "compensated"),
    "merge run out --model model --method requantize": ("MERGE-METHOD", "--method", "--bits 4"),
    "merge run out --model model --calibration c.txt": ("MERGE-METHOD", "--calibration"),
    "merge run out --model model --residual-rank 4": ("MERGE-METHOD", "--residual-rank"),
    "merge run out --model model --bits 4 --residual-rank 0": ("CLI-ARGS", "--residual-rank", "0"),
    "merge run out --model model --bits 4 --base original": ("MERGE-BASE", "dequantized"),
    "merge run out --model model --bits 4 --quantization none": ("MERGE-4BIT", "--quantization"),
    "merge run out --model model --bits 4 --method compensated": ("MERGE-CALIBRATION", "without"),
    "merge run out --model model --bits 4 --calibration nowhere.txt": ("DATA-MISSING", "nowhere"),
    "merge run out --model model --bits 4 --calibration short.txt": ("MERGE-CALIBRATION", "128"),
    # names that the system refuses
    f"inspect {'a' * 300}": ("FILE-READ", "File name too long"),
    f"export {'a' * 300} out --format hf": ("FILE-READ", "File name too long"),
    f"quantize {'a' * 300} out": ("FILE-READ", "File name too long"),
    f"merge {'a' * 300} out --model model": ("FILE-READ", "File name too long"),
    # quantize with an adapter that begins closer
    "quantize model out --init piza": ("INIT-NAME", "'piza'", "loftq_niter_N", "pissa"),
    "quantize model out --init gaussian": ("INIT-NAME", "'gaussian'"),
    "quantize model out --init pissa --iterations 0": ("INIT-ITERATIONS", "0", "from 1 to 100"),
    "quantize model out --init loftq": ("INIT-RANK", "rank 64", "32 x 64", "at most 32"),
    "quantize model out --init loftq --lora-r 0": ("LORA-RANK", "0", "from 1 to 4096"),
    "quantize model out --init loftq --lora-r 4 --lora-alpha 0": ("LORA-ALPHA", "0"),
    "quantize model out --init loftq --lora-r 4 --target-modules q,o_proj": ("LORA-TARGETS", "'q'"),
    "quantize model out --init loftq --lora-r 4 --rank-pattern up_proj": ("CLI-ARGS", "PATTERN="),
    "quantize model out --init loftq --rank-pattern up_proj=0": ("LORA-RANK", "up_proj", "0"),
    "quantize model out --init loftq_niter_4 --seed -1 --lora-r 4": ("INIT-SEED", "-1"),
    "quantize model out --init": ("CLI-ARGS", "--init"),
    "quantize model out --lora-r 8": ("INIT-OPTION", "--lora-r", "--init loftq"),
    "quantize model out --init loftq --seed 3": ("INIT-OPTION", "--seed", "loftq_niter_16"),
    "quantize model out --use-rslora": ("INIT-OPTION", "--use-rslora", "no --init"),
    "quantize model-4bit out --init pissa --lora-r 4": ("W4-REQUANTIZE", "quantized already"),
    "quantize model run --init pissa --lora-r 4": ("OUT-EXISTS", "run"),
    "quantize nowhere out --init pissa": ("MODEL-MISSING", "nowhere"),
    "quantize run out --init pissa": ("CFG-MISSING", "this is an adapter"),
    # inspect
    "inspect": ("CLI-ARGS", "path"),
    "inspect nowhere": ("MODEL-MISSING", "nowhere"),
    "inspect run/adapter_config.json": ("MODEL-FORMAT", "is a file"),
    "inspect run model": ("CLI-ARGS", "model"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def at_home(home, monkeypatch):
    """The home as the current folder, which is as it was afterwards."""
    monkeypatch.chdir(home)
    before = files(home)
    yield home
    assert files(home) == before


@pytest.mark.parametrize("argv", CASES)
def test_a_wrong_argument_is_one_line(argv, at_home, capsys):
    code = main(argv.split())
    shown = capsys.readouterr()
    assert code == 2, shown.err
    assert shown.out == ""
    assert shown.err.startswith("error["), shown.err
    assert shown.err.count("\n") == 1, shown.err
    for text in CASES[argv]:
        assert text in shown.err


def test_the_program_itself_says_so_too(at_home):
    argv = ["export", "run", "out", "--format", "hf"]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_jax", *argv], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error[EXPORT-KIND]: run: is an adapter")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("2GB", 2_000_000_000), ("500MB", 500_000_000), ("10kb", 10_000), ("1TB", 10**12)),
        *(("1.5 GB", 1_500_000_000), ("2GiB", 2 << 30), ("1MiB", 1 << 20), ("0.001KB", 1)),
    ],
)
def test_sizes(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize("verb", ["quantize", "merge", "export", "inspect"])
def test_help_names_every_argument_that_scripts_use(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    used = {
        "quantize": "model out --dtype --shard-size --report --init --iterations --lora-r "
        "--lora-alpha --use-rslora --target-modules --rank-pattern --alpha-pattern --seed",
        "merge": "adapter out --model --base dequantized original --dtype --shard-size --bits "
        "--method requantize compensated --calibration --residual-rank --text --tolerance",
        "export": "path out --format hf bnb-4bit peft gguf gguf-lora orbax --model --dtype --type "
        "f32 f16 bf16 q8_0 q4_0 --shard-size",
        "inspect": "path --json",
    }[verb]
    for word in used.split():
        assert word in shown

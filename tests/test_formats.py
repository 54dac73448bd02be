"""docs/formats.md tells the truth where a program can see it: names, options, error codes."""

import re
from pathlib import Path
from typing import get_args

from pallas_kernels.codebooks import CODEBOOKS
from qlora_jax.checkpoints.gguf_blocks import BLOCKS
from qlora_jax.checkpoints.gguf_metadata import FILE_TYPES
from qlora_jax.checkpoints.gguf_names import ARCHITECTURES
from qlora_jax.checkpoints.gguf_pack import PACKERS
from qlora_jax.cli.export import FORMATS, GGUF_TYPES
from qlora_jax.cli.options import DTYPES, KINDS
from qlora_jax.models.families import FAMILIES
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows.export_gguf import TYPES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "formats.md").read_text()


def cell(row: str, column: int) -> str:
    """One cell of the table row that begins with `row`."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row} |"))
    return line.strip("| ").split(" | ")[column]


def test_every_family_has_its_row_and_no_other():
    rows = re.search(r"\| `model_type`.*?\n\n", PAGE, re.DOTALL)[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows if row] == list(FAMILIES)


def test_ggufs_formats_and_architectures():
    words = cell("GGUF file", 2).replace(";", "").split()
    assert set(words[: len(BLOCKS)]) == {block.name for block in BLOCKS.values()}
    assert set(words[-len(ARCHITECTURES) :]) == set(ARCHITECTURES)


def test_every_format_and_value_of_an_option():
    out = re.search(r"\| `--format` .*?\n\n", PAGE, re.DOTALL)[0].splitlines()[2:]
    assert {row.split("|")[1].strip() for row in out if row} == set(FORMATS)
    for option, values in {"--dtype": DTYPES, "--type": GGUF_TYPES}.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{option} "))
        assert set(re.search(r"`(.*?)`", row)[1].replace(",", "").split()[1:]) == set(values)


def test_a_list_that_stands_twice_is_one():
    """The command line keeps its own, since it starts without the modules that have them."""
    assert set(KINDS) == set(CODEBOOKS)
    assert get_args(TrainConfig.model_fields["quant_type"].annotation) == KINDS
    assert set(GGUF_TYPES) == set(FILE_TYPES) == {name.lower() for name in PACKERS}
    assert get_args(TrainConfig.model_fields["dtype"].annotation) == DTYPES
    assert set(DTYPES) == set(TYPES)
    assert set(TYPES.values()) <= set(GGUF_TYPES)


def test_every_code_and_area_is_one_of_ours():
    source = "".join(path.read_text() for path in (ROOT / "qlora_jax").rglob("*.py"))
    codes = set(re.findall(r"\b[A-Z][A-Z0-9]+-[A-Z]{3,}\b|\bW-[A-Z]+\b", PAGE))
    assert len(codes) > 20
    areas = re.compile("GPTQ|AWQ|UTF")
    assert not [c for c in codes if f'"{c}"' not in source and not areas.match(c)]
    for row in re.search(r"\| format \|.*?\n\n", PAGE, re.DOTALL)[0].splitlines()[2:]:
        for area in filter(None, row.strip("| ").split(" | ")[-1].split(", ")):
            assert re.search(rf'"{area}-|"{area}"', source), area

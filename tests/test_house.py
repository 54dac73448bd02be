"""The house keeps its plan: imports go one way, and what README and configs say is so."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qlora_jax
from qlora_jax.train.config import TrainConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "qlora_jax")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOLDERS = (*PACKAGES, "benchmarks", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TORCH = re.compile(r"(^|\.)torch(\.|$)")  # and not checkpoints.torch_pickle, say
MODULE_IDS = [str(path.relative_to(ROOT)) for path in MODULES]

# Lowest first; a row imports rows above it and itself, and groups of one row never each other.
ORDER = [
    {"pallas_kernels"},
    {"errors", "placement", "process", "weight_names"},
    {"quantization"},
    {"adapters"},
    {"models"},
    {"checkpoints", "data", "optim"},
    {"train", "inference"},
    {"evaluation", "memory"},
    {"workflows"},
    {"cli"},
]
LEVEL = {group: level for level, row in enumerate(ORDER) for group in row}

# What only some files may import, and which.
ONLY_IN = {
    "orbax": ["qlora_jax/checkpoints/orbax_io.py", "tests/"],
    "transformers": ["qlora_jax/data/", "tests/"],
    "tokenizers": ["qlora_jax/data/", "tests/"],
    "datasets": ["qlora_jax/data/", "tests/"],
    "huggingface_hub": ["qlora_jax/workflows/hub.py", "tests/"],
    "jinja2": ["qlora_jax/data/", "tests/"],
    "chex": ["tests/"],
    "torch": [],
}
MAX_LINES = 400


def imports(path: Path, for_types: bool = True) -> list[str]:
    """The full names of all that a file imports, also inside functions.

    Without `for_types`, what stands under `if TYPE_CHECKING:` is left out: it is never run.
    """
    names, nodes = [], [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif for_types or not is_type_checking(node):
            nodes += ast.iter_child_nodes(node)
    return names


def is_type_checking(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def group_of(name: str) -> str | None:
    """The group of a dotted name: `qlora_jax.models.rope` is in models; None outside the house."""
    top, *rest = name.split(".")
    if top == "qlora_jax":
        return rest[0] if rest and rest[0] in LEVEL else "qlora_jax"
    return top if top == "pallas_kernels" else None


def wrong_way(importer: str, imported: str) -> bool:
    """Whether `importer`, a group, must not import `imported`."""
    if importer == imported or imported not in LEVEL:
        return imported == "qlora_jax"  # the lazy front door is for users
    return LEVEL[imported] >= LEVEL[importer] and not {importer, imported} <= ORDER[1]


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("models", "quantization", False),
        ("quantization", "models", True),
        ("data", "checkpoints", True),
        ("train", "optim", False),
        ("train", "train", False),
        ("pallas_kernels", "errors", True),
        ("workflows", "qlora_jax", True),
    ],
)
def test_the_rule_itself(importer, imported, wrong):
    assert wrong_way(importer, imported) == wrong


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_imports_go_one_way(path):
    importer = group_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert importer in LEVEL or path.parent == ROOT / "qlora_jax", f"{importer} is in no row"
    if importer not in LEVEL:  # __init__ and __main__ join everything
        return
    bad = [name for name in imports(path) if (g := group_of(name)) and wrong_way(importer, g)]
    assert not bad, f"{importer} imports {bad}"


def test_packages_with_one_home():
    bad = [
        f"{place}: {name}"
        for path in FILES
        for place in [path.relative_to(ROOT).as_posix()]
        for name in imports(path, for_types=False)
        if (homes := ONLY_IN.get(name.split(".")[0])) is not None
        if not place.startswith(tuple(homes))
    ]
    assert not bad


def test_torch_comes_by_no_other_way():
    """Nor from a module that has imported it, as in `from other.functional import torch`."""
    found = [f"{path}: {name}" for path in FILES for name in imports(path) if TORCH.search(name)]
    assert not found


def test_torch_is_no_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    assert not [name for name in [*project["dependencies"], *extras] if name.startswith("torch")]


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_a_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no docstring"
    first = docstring.splitlines()[0]
    assert first.endswith((".", "?")), "its first line is not a sentence"
    assert len(first.split()) > 2, "its first line says nothing"
    assert not path.name.startswith("_") or path.name in ("__init__.py", "__main__.py")


def test_every_folder_is_a_package():
    assert {path.parent for path in MODULES} == {p.parent for p in MODULES if p.stem == "__init__"}


def test_no_file_is_long():
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_public_names_are_there():
    for name in qlora_jax.__all__:
        assert getattr(qlora_jax, name).__doc__, name
    assert set(qlora_jax.__all__) <= set(dir(qlora_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora_jax.nothing


def tree_paths(readme: str) -> list[str]:
    """The paths that README's tree names: one a line, two spaces a level, folders end with /."""
    block = re.search(r"## The tree\n+```\n(.*?)```", readme, re.DOTALL)
    assert block, "README has no tree"
    paths, folders = [], []
    for line in block[1].splitlines():
        name = line.split()[0]
        level = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:level], name.rstrip("/")]
        assert len(folders) == level + 1, f"indented too deep: {line}"
        paths.append("/".join(folders))
    return paths


def test_readmes_tree_is_the_real_tree():
    named = tree_paths((ROOT / "README.md").read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []
    folders = {str(path.parent.relative_to(ROOT)) for path in MODULES}
    assert folders - set(named) == set(), "package folders that README does not name"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_a_recipe_is_a_valid_config(path):
    overrides = ["model=here", "dataset=rows.jsonl", "output_dir=out"]
    config = TrainConfig.from_yaml(path, overrides)
    assert config.notes == (), "a recipe is written in the keys' own names"


def loaded_by(*arguments: str) -> set[str]:
    """The modules in memory after `qlora-jax ARGUMENTS` in a fresh Python."""
    program = (
        "import sys; from qlora_jax.cli.main import main; "
        f"code = main({list(arguments)!r}); print('MODULES', *sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.rsplit("MODULES ", 1)[1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=" ".join)
def test_the_command_line_starts_without_heavy_imports(arguments):
    heavy = {"jax", "numpy", "transformers", "datasets", "pydantic", "matplotlib", "rich"}
    assert loaded_by(*arguments) & heavy == set()

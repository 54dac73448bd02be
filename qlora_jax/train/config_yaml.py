"""YAML in and out, as people mean it: 2e-4 is a number, `on` is a word, no key is given twice.

PyYAML reads YAML 1.1, where 2e-4 is text, `on` and `no` are booleans, and of two equal keys the
last silently wins. Here numbers and booleans are those of YAML 1.2's core schema.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qlora_jax.errors import InputError, first_line

LIMIT_BYTES = 1 << 20
CORE = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema, without aliases, and strict about keys."""

    yaml_implicit_resolvers: ClassVar = {}

    def compose_node(self, parent, index):
        """Aliases can make a small file expand without bound, and a flat config needs none."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: an alias (*name) is not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        """Refuses a key that is given twice."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, list | dict) or key in lines:
                what = f"the key {key!r} is doubled" if key in lines else "a key is not text"
                raise yaml.YAMLError(f"line {line}: {what}")
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        """Decimal, also with leading zeros, which are octal in YAML 1.1."""
        return int(self.construct_scalar(node))


for tag, (pattern, first) in CORE.items():
    Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), list(first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
      InputError: CFG-FILE (missing, a folder, too large), CFG-YAML (not YAML, doubled keys, not a
        mapping of keys), with the line.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "missing: no such file"
        raise InputError("CFG-FILE", str(path), what, "a YAML file")
    if path.stat().st_size > LIMIT_BYTES:
        raise InputError("CFG-FILE", str(path), "is too large", f"at most {LIMIT_BYTES} bytes")
    try:
        found = parse(path.read_text("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 at byte {error.start}"
        raise InputError("CFG-YAML", str(path), what, "a YAML file") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError("CFG-YAML", str(path), "does not hold keys", "lines such as lora_r: 16")
    return found


def parse(text: str, where: str) -> Any:
    """The value of a piece of YAML."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError("CFG-YAML", f"{where}{line}", f"is not YAML: {error.problem}") from None
    except RecursionError:
        raise InputError("CFG-YAML", where, "is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # a number of 5000 digits is a ValueError
        raise InputError("CFG-YAML", where, first_line(error)) from None


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["lora_r=16", "exclude_modules=[lm_head]"]` as a dict; values are YAML.

    Raises:
      InputError: CFG-OVERRIDE, one has no `=` or comes twice; CFG-YAML, a value is not YAML.
    """
    found: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            expected = "key=value"
            raise InputError("CFG-OVERRIDE", "command line", repr(override), expected)
        if key in found:
            raise InputError("CFG-OVERRIDE", f"command line:{key}", "the key is doubled")
        found[key] = parse(value, f"command line:{key}")
    return found


def to_yaml(values: dict[str, Any]) -> str:
    """YAML that both YAML 1.1 and 1.2 read alike, in the order of the keys."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)

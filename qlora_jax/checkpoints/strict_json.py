"""JSON of strangers: an object, with every key once, of bounded size, and nothing that is not JSON.

Python's `json` takes NaN, Infinity, 1e999 and doubled keys, of which the last silently wins.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from qlora_jax.checkpoints.files import opened
from qlora_jax.errors import InputError

CONFIG_LIMIT = 1 << 20  # bytes of a config.json or adapter_config.json
ITEMS_LIMIT = 4_000_000  # keys and list items: what a small file may cost once it is parsed
DEPTH_LIMIT = 64


def read_json(path: str | Path, limit_bytes: int = CONFIG_LIMIT) -> dict[str, Any]:
    """The object in the file `path`.

    Raises:
      InputError: JSON-MISSING, JSON-SIZE, FILE-KIND for a folder or pipe, those of `parse_json`.
    """
    where = str(path)
    with opened(path, missing="JSON-MISSING") as file:
        size = os.fstat(file).st_size
        if size > limit_bytes:
            raise InputError("JSON-SIZE", where, f"has {size} bytes", f"at most {limit_bytes}")
        text = os.pread(file, limit_bytes, 0)
    return parse_json(text, where)


def parse_json(text: bytes, where: str, depth: int = DEPTH_LIMIT) -> dict[str, Any]:
    """The object that `text` (UTF-8) holds; `where` is named in errors.

    Raises:
      InputError: JSON-SYNTAX, JSON-KEYS (a doubled key), JSON-NUMBER (NaN, Infinity, too large),
        JSON-DEPTH, JSON-ITEMS, JSON-OBJECT (not an object at the top).
    """
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > ITEMS_LIMIT:
        raise InputError("JSON-ITEMS", where, "too many items", f"at most {ITEMS_LIMIT}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            key = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise InputError(
                "JSON-KEYS", where, f"the key {key[:80]!r} is doubled", "each key once"
            )
        return found

    def not_a_number(word: str) -> NoReturn:
        raise InputError("JSON-NUMBER", where, f"{word[:20]} is not JSON", "a finite number")

    def finite(word: str) -> float:
        number = float(word)
        return number if math.isfinite(number) else not_a_number(word)

    try:
        found = json.loads(
            text.decode(),
            object_pairs_hook=unique,
            parse_constant=not_a_number,
            parse_float=finite,
        )
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 at byte {error.start}"
        raise InputError("JSON-SYNTAX", where, found, "JSON") from None
    except json.JSONDecodeError as error:
        line = f"{where}:{error.lineno}"
        raise InputError(
            "JSON-SYNTAX", line, f"{error.msg} (column {error.colno})", "JSON"
        ) from None
    except RecursionError:
        raise InputError("JSON-DEPTH", where, "nested too deep", f"depth <= {depth}") from None
    except ValueError:  # Python refuses whole numbers of more than 4300 digits
        raise InputError("JSON-NUMBER", where, "a number with too many digits") from None
    if not isinstance(found, dict):
        kind = {list: "a list", str: "text", type(None): "null"}.get(type(found), "a number")
        raise InputError("JSON-OBJECT", where, f"holds {kind}", "an object: {...}")
    check_depth(found, where, depth)
    return found


def check_depth(tree: Any, where: str, limit: int) -> None:
    """Refuses objects and lists inside each other deeper than `limit`."""
    level = [tree]
    for _ in range(limit):
        inner = [v for node in level for v in (node.values() if type(node) is dict else node)]
        level = [v for v in inner if type(v) in (dict, list)]
        if not level:
            return
    raise InputError("JSON-DEPTH", where, "nested too deep", f"depth <= {limit}")

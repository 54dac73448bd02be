"""Damage to JSON documents: other values, keys renamed and doubled, text that is no JSON."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.reliability.damage import NUMBERS, TEXTS, Mutated, bits, pieces

RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 200 + "]" * 200, "{}}", "tru", "'a'",
    "[1,]", '{"a":1,"a":1}', "0x10", "+1", "01", ".5", '"\n"', '"\\ud800"', "/**/1", "",
)  # fmt: skip
MARK = "\u241fraw\u241f"  # stands for text that is no JSON


def value(rng: Random, old: Any) -> Any:
    """Another value than `old`: of another kind, out of range, or not JSON at all."""
    if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.3:
        return rng.choice((old + 1, old - 1, -old, old * 2, old / 2, float(old), str(old), [old]))
    if isinstance(old, str) and rng.random() < 0.3:
        return rng.choice((old.upper(), old + " ", old[:-1], old * 2, "." + old, [old]))
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: MARK + rng.choice(RAW),
            lambda: rng.choice((None, True, False, [], {}, [[]], {"a": {}}, [None], [True])),
        )
    )()


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key and item of a JSON document."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def json_tree(tree: Any, rng: Random, extra: tuple[str, ...] = ()) -> bytes:
    """A JSON document with one value, key or item spoiled; `extra` are keys that may be added."""
    tree = json.loads(json.dumps(tree))
    path = rng.choice(list(places(tree)))
    node = tree
    for key in path[:-1]:
        node = node[key]
    key = path[-1]
    acts = ["value", "value", "value", "value", "remove", "double"]
    acts += ["rename", "add", "double"] if isinstance(node, dict) else ["swap"]
    act = rng.choice(acts)
    if act == "value":
        node[key] = value(rng, node[key])
    elif act == "remove":
        del node[key]
    elif act == "rename":
        node[rng.choice((key + "_", key.upper(), rng.choice(TEXTS)))] = node.pop(key)
    elif act == "add":
        node[rng.choice((*extra, rng.choice(TEXTS)))] = value(rng, None)
    elif act == "swap":
        node[key], node[0] = node[0], node[key]
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[MARK + key] = node[key]
    return as_text(tree, rng)


def as_text(tree: Any, rng: Random) -> bytes:
    """JSON in which marked texts stand raw, and a marked key is its doubled self."""
    plain = json.dumps(tree, ensure_ascii=rng.random() < 0.5 or "\\ud800" in json.dumps(tree))
    for mark in (MARK, json.dumps(MARK)[1:-1]):
        while (start := plain.find(f'"{mark}')) >= 0:
            _, end = json.decoder.scanstring(plain, start + 1)
            inner = json.loads(plain[start:end])[len(MARK) :]
            is_key = plain[end : end + 1] == ":"
            plain = plain[:start] + (json.dumps(inner) if is_key else inner) + plain[end:]
    return plain.encode(errors="surrogatepass")


def json_file(data: bytes, rng: Random, extra: tuple[str, ...] = ()) -> Mutated:
    """A JSON file spoiled as a document, or as bytes."""
    if rng.random() < 0.15:
        return rng.choice((bits, pieces))(data, rng)[0], 0
    return json_tree(json.loads(data), rng, extra), 0

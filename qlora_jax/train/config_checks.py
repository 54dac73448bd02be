"""Settings against tables, types and ranges: every violation is an error, none hides another."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from qlora_jax.errors import InputError, nearest
from qlora_jax.train.config_rules import (
    ALIASES,
    CONTRADICTIONS,
    REQUIRED,
    UNSUPPORTED,
    Unused,
)

LONGEST = 200  # characters of a value in a message
BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


class ConfigErrors(InputError):
    """Several things wrong with one configuration: `errors`, and as text a line each."""

    def __init__(self, errors: list[InputError]):
        super().__init__("CFG", errors[0].where, f"{len(errors)} errors")
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


def raise_all(problems: list[InputError]) -> None:
    """Raises the one problem, or all of them together."""
    if problems:
        raise problems[0] if len(problems) == 1 else ConfigErrors(problems)


def translated(
    values: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[InputError]]:
    """(values by our names, notes on aliases, errors for unknown and doubled keys)."""
    found, notes, problems = {}, [], []
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name not in known:
            near = nearest(key, known) or nearest(key, ALIASES)
            hint = f"did you mean {near[0]}" if near else ""
            problems.append(InputError("CFG-KEY", key, "unknown key", hint=hint))
        elif name in found or (name != key and name in values):
            what = f"is {name}, which is set too"
            problems.append(InputError("CFG-KEY", key, what, "one of the two"))
        else:
            found[name] = plain(value)
            if name != key:
                notes.append(f"{key} is read as {name}")
    return found, notes, problems


def plain(value: Any) -> Any:
    """A path as text and a tuple as a list, as a YAML file would hold them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def unsupported(values: Mapping[str, Any]) -> list[InputError]:
    """An error for each value that is refused by name."""
    return [
        InputError(
            "CFG-UNSUPPORTED", rule.key, f"{shown(values[rule.key])}: {rule.why}", hint=rule.hint
        )
        for rule in UNSUPPORTED
        if rule.key in values and rule.when(values[rule.key])
    ]


def unused(
    values: Mapping[str, Any], settings: Mapping[str, Any], rules: Iterable[Unused]
) -> list[InputError]:
    """An error for each key that was set and has no effect.

    Args:
      values: what was set.
      settings: the same and the defaults.
    """
    return [
        InputError("CFG-UNUSED", key, f"is set and has no effect: {rule.why}", hint=rule.hint)
        for rule in rules
        if rule.when(settings)
        for key in rule.keys
        if key in values
    ]


def contradictory(settings: Mapping[str, Any]) -> list[InputError]:
    """An error for each pair of settings that cannot both hold."""
    return [
        InputError(
            "CFG-TOGETHER",
            rule.key,
            f"{shown(settings[rule.key])} {rule.why}",
            rule.expected,
            rule.hint,
        )
        for rule in CONTRADICTIONS
        if rule.when(settings)
    ]


def missing(values: Mapping[str, Any], required: Iterable[str]) -> list[InputError]:
    """An error for each required key without a value."""
    return [
        InputError("CFG-MISSING", key, "missing", *REQUIRED[key])
        for key in required
        if values.get(key) is None
    ]


def invalid(error: ValidationError, model: type[BaseModel]) -> list[InputError]:
    """pydantic's errors as ours, one a key: the value, and what the key's type and range are."""
    schema = model.model_json_schema()["properties"]
    problems = {}
    for one in error.errors(include_url=False):
        key, *inner = one["loc"]
        found = shown(one["input"])
        if inner and schema[key].get("type") in ("array", "object"):
            found += f" for {inner[0]!r}"
        problem = InputError("CFG-VALUE", key, found, expected(schema[key]))
        problems.setdefault(key, problem)
    return list(problems.values())


def expected(schema: dict[str, Any]) -> str:
    """A JSON schema in words, its own if it has some: `a whole number from 1 to 4096`."""
    if "description" in schema:
        return schema["description"]
    if "anyOf" in schema:
        return " or ".join(expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        return f"a list of {expected(schema['items'])}"
    if schema["type"] == "object":
        return f"keys, each with {expected(schema['additionalProperties'])}"
    if schema["type"] == "string":
        return "text"
    name = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}.get(
        schema["type"], schema["type"]
    )
    if "minimum" in schema and "maximum" in schema:
        return f"{name} from {schema['minimum']} to {schema['maximum']}"
    limits = [f"{word} {schema[bound]}" for bound, word in BOUNDS.items() if bound in schema]
    return f"{name} {' and '.join(limits)}".rstrip()


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def relabelled(
    problems: Iterable[InputError], file: str, overridden: Iterable[str]
) -> list[InputError]:
    """The same errors with `file:key` or, for what was overridden, `command line:key`."""
    return [
        InputError(
            one.code,
            f"{'command line' if one.where in overridden else file}:{one.where}",
            one.found,
            one.expected,
            one.hint,
        )
        for one in problems
    ]

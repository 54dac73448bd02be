"""Versions, devices, memory, and whether the kernels compute right here: a block for a report."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

GB = 1e9


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; the exit code is 1 when a kernel computes wrongly."""
    from qlora_jax.workflows.environment import disk, environment
    from qlora_jax.workflows.self_test import kernel_test

    found, checks = environment(), kernel_test()
    found["disk"] = disk()
    found["kernels"] = [{**asdict(check), "right": check.right} for check in checks]
    found["advice"] = list(advice(found))
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0 if all(check.right for check in checks) else 1


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The report as text, one `label   value` a line."""

    def row(label: str, value: str) -> str:
        return f"{label:<10} {value}"

    yield row("python", f"{found['python']} on {found['platform']}, {found['cpus']} CPUs")
    packages = [f"{name} {version}" for name, version in found["packages"].items()]
    for start in range(0, len(packages), 5):
        yield row("" if start else "packages", ", ".join(packages[start : start + 5]))
    yield row("backend", found["backend"])
    for device in found["devices"]:
        text = f"{device['id']}: {device['kind']}, memories {', '.join(device['memories'])}"
        if "bytes_limit" in device:
            used, limit = device["bytes_in_use"], device["bytes_limit"]
            text += f", JAX may take {limit / GB:.1f} GB, holds {used / GB:.1f} GB"
        yield row("device", text)
    if gpu := found["gpu"]:
        yield row("driver", gpu["driver"])
        for card in gpu["gpus"]:
            yield row("gpu", f"{card['name']}, {card['used_mib']} of {card['total_mib']} MiB used")
        for holder in gpu["held_by"]:
            yield row("held by", f"{holder['process']} ({holder['pid']}): {holder['used_mib']} MiB")
    memory = found["memory"]
    yield row("memory", ", ".join(f"{value / GB:.1f} GB {key}" for key, value in memory.items()))
    yield row(
        "disk", f"{found['disk']['free'] / GB:.1f} of {found['disk']['total'] / GB:.1f} GB free"
    )
    for key, value in found["variables"].items():
        yield row("variable", f"{key}={value}")
    for check in found["kernels"]:
        yield row("kernel", f"nf4_matmul {check['backend']}: {verdict(check)}")
    for text in found["advice"]:
        yield row("note", text)


def verdict(check: dict[str, Any]) -> str:
    """One backend's self-test in words."""
    if check["error"] is None:
        return f"not here: {check['reason']}"
    word = "right" if check["right"] else "WRONG"
    return f"{word} ({check['layout']} order, off by {check['error']:.1e} of the largest value)"


def advice(found: dict[str, Any]) -> Iterator[str]:
    """What a reader of the report would point out."""
    if found["gpu"] and found["backend"] == "cpu":
        yield (
            "there is a GPU, but JAX runs on the CPU: pip install 'qlora-jax[cuda12]' or "
            "'qlora-jax[cuda13]', and unset JAX_PLATFORMS"
        )
    if found["backend"] == "gpu" and not any("MEM_FRACTION" in key for key in found["variables"]):
        yield (
            "JAX takes 75% of a GPU's memory when it starts; XLA_CLIENT_MEM_FRACTION=.95 gives it "
            "more, XLA_PYTHON_CLIENT_PREALLOCATE=false lets it grow as needed"
        )
    if any(check["error"] is not None and not check["right"] for check in found["kernels"]):
        yield "a kernel computes wrongly here: please report this whole block"

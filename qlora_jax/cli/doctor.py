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
    """Prints what was found; the exit code is 1 when a kernel is wrong or fails."""
    from qlora_jax.workflows.environment import disk, environment
    from qlora_jax.workflows.self_test import kernel_test

    found, checks = environment(), kernel_test()
    found["disk"] = disk()
    found["kernels"] = [asdict(check) for check in checks]
    found["advice"] = list(advice(found))
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0 if all(check.fine for check in checks) else 1


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
    for backend in dict.fromkeys(check["backend"] for check in found["kernels"]):
        checks = [check for check in found["kernels"] if check["backend"] == backend]
        verdicts = list(kernel(checks))
        yield row("kernel", f"nf4_matmul {backend}: {verdicts[0]}")
        for text in verdicts[1:]:
            yield row("", f"  {text}")
    for text in found["advice"]:
        yield row("note", text)


def kernel(checks: list[dict[str, Any]]) -> Iterator[str]:
    """One backend's self-test in words, the products of one outcome and reason together."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in checks:
        alike.setdefault((check["outcome"], check["reason"]), []).append(check)
    for (outcome, reason), some in sorted(
        alike.items(), key=lambda item: OUTCOMES.index(item[0][0])
    ):
        about = "" if len(some) == len(checks) else " " + joined([c["product"] for c in some])
        if outcome == "refused":
            yield f"not here{about and ' for' + about}: {reason}"
        elif outcome == "failed":
            yield f"FAILED{about}: {reason}"
        else:
            error, layout = max(check["error"] for check in some), some[0]["layout"]
            word = "WRONG" if outcome == "wrong" else "right"
            yield f"{word}{about} ({layout} order, off by {error:.1e} of the largest value)"


OUTCOMES = ("wrong", "failed", "right", "refused")  # in the order in which they are told


def joined(products: list[str]) -> str:
    """`16, 256 rows forward; 16 rows backward`: what differs in its rows alone is told together."""
    by_kind: dict[str, list[str]] = {}
    for product in products:
        number, _, kind = product.partition(" ")
        by_kind.setdefault(kind, []).append(number)
    return "; ".join(f"{', '.join(numbers)} {kind}" for kind, numbers in by_kind.items())


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
    if any(check["outcome"] in ("wrong", "failed") for check in found["kernels"]):
        yield "a kernel computes wrongly or fails here: please report this whole block"

"""What compiled kernels must reach, by the compiler's own figures and the paper roofline."""

from collections.abc import Iterable

from pallas_kernels.gpu import KNOWN

# Of every entry of compiled.json, and of compiled_steps.json.
KEYS = (
    "kernel",
    "gpu",
    "direction",
    "m",
    "n",
    "k",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "instructions_per_weight",
    "roofline_us",
    "ideal_bf16_us",
)
STEP_KEYS = (
    "gpu",
    "model",
    "seq_len",
    "stream_weights",
    "remat",
    "device_bytes",
    "host_bytes",
    "argument_bytes",
    "output_bytes",
    "temp_bytes",
)
# The backends of nf4_matmul that are Mosaic kernels, in the order in which they are asked.
BACKENDS = ("small_m", "hopper", "blackwell", "ampere")

# (kernel, smallest m, most instructions a weight). At m > 128 Hopper's tile has 256 rows.
INSTRUCTIONS = (("hopper", 256, 7.0), ("small_m", 1, 3.6))

SQUARE = 4096  # n and k of the cases below
# m: {gpu: the most that roofline_us / ideal_bf16_us may be}
RATIOS = {
    16: {"a100": 1 / 2.5, "rtx4090": 1 / 2.5, "h100": 1 / 2.5, "h200": 1 / 2, "b200": 1 / 1.4},
    256: {"a100": 1.1, "h100": 1.1, "rtx4090": 1.2},
    4096: {"a100": 1.15, "h100": 1.15, "rtx4090": 1.15},
}

# Of steps compiled for STEP_GPU, one row of r = 16 on all linears: the most bytes of each kind, by
# (model, tokens, stream_weights, remat). GB is 1e9 bytes.
STEP_GPU = "rtx4090"
STEPS = {
    ("Llama-3.1-8B", 2048, "off", "full"): {"temp_bytes": 1.54e9, "device_bytes": 8e9},
    ("Llama-3.1-8B", 512, "all", "offload"): {"device_bytes": 2e9},
    ("Llama-3.1-8B", 4096, "all", "offload"): {"device_bytes": 4e9},
    ("Llama-3-70B", 4096, "on", "full"): {"device_bytes": 16e9, "host_bytes": 45e9},
    ("Llama-3-70B", 4096, "on", "offload"): {"device_bytes": 10e9, "host_bytes": 45e9},
}


def name(entry: dict) -> str:
    """`hopper h100 forward 256x4096x4096`, `dequantize h100 4096x4096`."""
    size = "x".join(str(entry[axis]) for axis in "mnk" if entry[axis])
    return " ".join(filter(None, (entry["kernel"], entry["gpu"], entry["direction"], size)))


def missed(entries: Iterable[dict]) -> list[str]:
    """A line for each bar that an entry of compiled.json does not reach."""
    entries = list(entries)
    lines = []
    for entry in entries:
        limit = KNOWN[entry["gpu"]].shared_bytes
        if entry["spill_bytes"]:
            lines.append(f"{name(entry)}: spills {entry['spill_bytes']} bytes")
        if entry["shared_bytes"] > limit:
            lines.append(f"{name(entry)}: {entry['shared_bytes']} bytes shared of {limit}")
        for kernel, smallest, most in INSTRUCTIONS:
            found = entry["instructions_per_weight"]
            if entry["kernel"] == kernel and entry["m"] >= smallest and found > most:
                lines.append(f"{name(entry)}: {found} instructions a weight, not {most}")
    for entry in first_choices(entries):
        most = RATIOS.get(entry["m"], {}).get(entry["gpu"])
        if most is None or (entry["n"], entry["k"]) != (SQUARE, SQUARE):
            continue
        ratio = entry["roofline_us"] / entry["ideal_bf16_us"]
        if ratio > most:
            lines.append(f"{name(entry)}: {ratio:.3f} of the time of bf16, not {most:.3f}")
    return lines


def of_step(gpu: str, model: str, length: int, stream_weights: str, remat: str) -> dict[str, float]:
    """The most bytes of each kind that a step may take; empty where it has no bar."""
    return STEPS.get((model, length, stream_weights, remat), {}) if gpu == STEP_GPU else {}


def missed_by_steps(entries: Iterable[dict]) -> list[str]:
    """A line for each bar that an entry of compiled_steps.json does not reach."""
    return [
        f"{step_name(entry)}: {entry[kind]} {kind}, not {most:.0f}"
        for entry in entries
        for kind, most in of_step(*(entry[key] for key in STEP_KEYS[:5])).items()
        if entry[kind] > most
    ]


def step_name(entry: dict) -> str:
    """`rtx4090 Llama-3-70B 1x4096 on offload`."""
    gpu, model, length, stream_weights, remat = (entry[key] for key in STEP_KEYS[:5])
    return f"{gpu} {model} 1x{length} {stream_weights} {remat}"


def first_choices(entries: Iterable[dict]) -> list[dict]:
    """Of the products, for each GPU and case, that of the backend that is asked first.

    In decoding no gradient is asked for, so a backward product of few rows has no bar.
    """
    chosen = {}
    for entry in entries:
        few = entry["direction"] == "backward" and entry["m"] == 16
        if entry["kernel"] not in BACKENDS or few:
            continue
        case = tuple(entry[key] for key in ("gpu", "direction", "m", "n", "k"))
        rival = chosen.setdefault(case, entry)
        if BACKENDS.index(entry["kernel"]) < BACKENDS.index(rival["kernel"]):
            chosen[case] = entry
    return list(chosen.values())

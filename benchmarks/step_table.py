"""What benchmarks/compile_steps.py prints: a line a case, and README's table of what fits where."""

from collections.abc import Iterable

GPU = "rtx4090"
# (stream_weights, remat): the head of a column.
PLACEMENTS = {
    ("off", "full"): "resident",
    ("on", "full"): "layers streamed",
    ("on", "offload"): "+ layer inputs on the host",
    ("all", "offload"): "+ embedding, head streamed",
}


def line(entry: dict) -> str:
    """One case, as it is printed."""
    where = f"{entry['stream_weights']}, {entry['remat']}"
    return (
        f"{entry['gpu']:8} {entry['model']:13} 1 x {entry['seq_len']:<5} {where:13}"
        f"{entry['device_bytes'] / 1e9:7.2f} GB on the device "
        f"({entry['temp_bytes'] / 1e9:.2f} temporary), {entry['host_bytes'] / 1e9:.2f} on the host"
    )


def markdown(entries: Iterable[dict]) -> str:
    """A row for each model and length on one GPU: GB on the device by placement, GB on the host."""
    rows: dict[tuple, dict] = {}
    for entry in entries:
        if entry["gpu"] == GPU:
            place = entry["stream_weights"], entry["remat"]
            rows.setdefault((entry["model"], entry["seq_len"]), {})[place] = entry
    heads = ["model, tokens", *PLACEMENTS.values(), "host memory"]
    lines = [heads, ["---"] * len(heads)]
    for (model, length), found in rows.items():
        cells = [f"{found[place]['device_bytes'] / 1e9:.1f} GB" for place in PLACEMENTS]
        host = [found[place]["host_bytes"] / 1e9 for place in PLACEMENTS]
        lines.append([f"{model}, 1 x {length}", *cells, f"{min(host):.1f} to {max(host):.1f} GB"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

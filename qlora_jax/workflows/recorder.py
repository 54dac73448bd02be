"""What a run says while it goes: the row on the terminal, metrics.jsonl, the plot, the summary."""


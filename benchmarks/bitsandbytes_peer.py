"""Times bitsandbytes for benchmarks/kernels.py, in an interpreter that has it.

It imports nothing of this repository, and nothing of this repository imports it. A request is a
line of JSON on its input, the answer a line on its output:

    {"prepare": {"op", "m", "n", "k", "direction", "calls", "double"}} -> {"names": [...]}
    {"run": name}                                                      -> {"seconds": of one call}
"""

import json
import sys
import time

import bitsandbytes
from bitsandbytes.functional import dequantize_4bit, gemv_4bit, quantize_4bit, torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def functions(op, m, n, k, direction, calls, double):
    """The calls of one request by name, each over all weights; all are run once."""
    weights = []
    for _ in range(calls):
        w = torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE)
        weights.append(quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type="nf4"))
    found = {}
    if op == "dequantize":
        found["bitsandbytes"] = lambda: [dequantize_4bit(q, state) for q, state in weights]
    elif direction == "forward":
        x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
        multiply = bitsandbytes.matmul_4bit
        found["bitsandbytes"] = lambda: [multiply(x, q.t(), state) for q, state in weights]
        if m == 1:
            found["bitsandbytes gemv"] = lambda: [
                gemv_4bit(x, q.t(), state=state) for q, state in weights
            ]
    else:  # what bitsandbytes' MatMul4Bit.backward does
        dy = torch.randn(m, n, dtype=torch.bfloat16, device=DEVICE)
        found["bitsandbytes"] = lambda: [
            torch.matmul(dy, dequantize_4bit(q, state)) for q, state in weights
        ]
    return {name: recorded(function) for name, function in found.items()}


def recorded(function):
    """The calls as one CUDA graph, as XLA's program is one launch; on a CPU, as they are."""
    with torch.no_grad():
        function()
        if DEVICE == "cpu":
            return function
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = function()
    return lambda kept=kept: graph.replay()


def seconds(function) -> float:
    """Wall time, from a quiet device to a quiet device."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        function()
    wait()
    return time.perf_counter() - start


def main() -> None:
    ready, calls = {}, 1
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "device": DEVICE}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                ready.clear()  # gives the memory of the last request back
                calls = request["prepare"]["calls"]
                ready.update(functions(**request["prepare"]))
                answer = {"names": list(ready)}
            else:
                answer = {"seconds": seconds(ready[request["run"]]) / calls}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

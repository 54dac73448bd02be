"""Compiles every kernel for GPUs that are not there, and reads what came out.

    python -m benchmarks.compile_gpu --only hopper --gpu h100 --m 256     one kernel, in detail

Everything printed is the compiler's or paper; nothing is run.
"""

import argparse
import importlib
import importlib.util

import jax
import jax.numpy as jnp

from benchmarks import aot, sass
from pallas_kernels.backends import Unsupported
from pallas_kernels.gpu import KNOWN
from pallas_kernels.nf4_matmul.weight import Weight

BACKENDS = ("small_m", "hopper", "blackwell", "ampere")


def modules(only: str | None) -> dict:
    """The Mosaic backends of nf4_matmul that exist, by name."""
    names = [only] if only else BACKENDS
    found = [(name, f"pallas_kernels.nf4_matmul.{name}") for name in names]
    return {n: importlib.import_module(path) for n, path in found if importlib.util.find_spec(path)}


def shapes(m: int, n: int, k: int, direction: str):
    """(x or dy, W) as shapes."""
    like = jax.ShapeDtypeStruct
    scales = like((n * k // 64,), jnp.float32)
    weight = Weight(like((n, k // 2), jnp.uint8), scales, (n, k), "nf4", 64, "bnb")
    return like((m, k if direction == "forward" else n), jnp.bfloat16), weight


def detail(name: str, gpu: str, m: int, n: int, k: int) -> None:
    """Prints all that is known of one backend's kernels."""
    (module,) = modules(name).values()
    for direction in ("forward", "backward"):
        try:
            found = aot.kernels(KNOWN[gpu], getattr(module, direction), *shapes(m, n, k, direction))
        except Unsupported as reason:
            print(f"{name} {direction} does not take M={m} N={n} K={k} on {gpu}: {reason}")
            continue
        for kernel in found:
            print(
                f"{name} {gpu} {direction} M={m} N={n} K={k}: {kernel.registers} registers, "
                f"{kernel.spill_bytes} bytes spilled, {kernel.shared_bytes} of "
                f"{KNOWN[gpu].shared_bytes} bytes shared"
                + (", wgmma SERIALIZED" if kernel.serialized else "")
            )
            loop = sass.main_loop(kernel.sass)
            for each in sass.loops(kernel.sass):
                mark = "main loop" if each.instructions == loop.instructions else "loop"
                print(f"  {mark}: {len(each.instructions)} instructions", end="")
                if weights := each.weights:
                    print(
                        f", {weights} weights a thread: {len(each.instructions) / weights:.2f} a "
                        f"weight, half rate {each.half_rate / weights:.2f}, {each.matrix} matrix"
                    )
                    print("    ", *(f"{op} {c}" for op, c in each.counts.most_common()))
                else:
                    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="BACKEND", required=True, help="this backend alone")
    parser.add_argument("--gpu", choices=KNOWN, default="h100")
    parser.add_argument("--m", type=int, default=256)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    args = parser.parse_args()
    detail(args.only, args.gpu, args.m, args.n, args.k)


if __name__ == "__main__":
    main()

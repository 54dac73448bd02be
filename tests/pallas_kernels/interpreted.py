"""Kernels run on the CPU by Mosaic's interpreter, in which a race or a stall is an error.

The interpreter runs each group of threads of a block as a thread of the CPU, and keeps vector
clocks for what is ordered before what. It reports races as jax's version likes: 0.12 raises, 0.11
prints and goes on. Here both fail, and a kernel whose threads wait for each other fails too.
Products by wgmma are as asynchronous as the hardware's: strict_wgmma.py.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from jax._src import dispatch
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu
from tests.pallas_kernels.strict_wgmma import asynchronous

# A copy by TMA, and a product by the tensor core, counts time as a thread of its own. Numbers are
# reused in turn, and two events of one number are taken for ordered: so many that none comes twice.
ASYNC_THREADS = 400


@contextlib.contextmanager
def interpreter(name: str, *, sms: int, seconds: float = 120) -> Iterator[None]:
    """Within it kernels are interpreted for gpu.KNOWN[name] with `sms` multiprocessors.

    Raises what a kernel raises (of jax's own types), AssertionError for a race that was only
    printed, TimeoutError's text within jax's error when a kernel takes `seconds`.
    """
    target = dataclasses.replace(gpu.KNOWN[name], sms=sms)
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=ASYNC_THREADS)
    with (
        gpu.pretend(target, interpret=True),
        plgpu.force_gpu_interpret_mode(params),
        clean_after_failure(),
        asynchronous(),
        races_raise(),
        no_stall(seconds),
    ):
        yield


@contextlib.contextmanager
def clean_after_failure() -> Iterator[None]:
    """A kernel that failed leaves its memory and the order of its callbacks behind."""
    try:
        yield
    except BaseException:
        gpu_callbacks.reset_gpu_interpret_mode_state()
        dispatch.runtime_tokens.clear()
        raise


@contextlib.contextmanager
def races_raise() -> Iterator[None]:
    """AssertionError at the end when any kernel within had a race."""
    kept, make = [], gpu_callbacks.GPURaceDetectionState

    def keeping(*args, **kwargs):
        kept.append(make(*args, **kwargs))
        return kept[-1]

    gpu_callbacks.GPURaceDetectionState = keeping
    try:
        yield
    finally:
        gpu_callbacks.GPURaceDetectionState = make
    assert not any(state.races_found for state in kept), "RACE DETECTED, printed above"


@contextlib.contextmanager
def no_stall(seconds: float) -> Iterator[None]:
    """After `seconds` the running kernel fails: threads at a barrier wake up and raise."""

    def fail():
        if (memory := gpu_callbacks._shared_memory) is not None:
            stalled = TimeoutError(f"the kernel did not end within {seconds} seconds")
            memory.set_failed(stalled, None, top_level=False)

    timer = threading.Timer(seconds, fail)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

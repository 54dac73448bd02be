"""wgmma as the hardware runs it, for jax's interpreter, which multiplies at once and never waits.

On the GPU `wgmma` is asynchronous: it reads shared memory some time between its issue and the
return of a wait that covers it, through the async proxy, to which plain stores are visible after a
`commit_smem` only. Here a product is computed as late as it may be, and its operands are checked
for races twice, as reads by a thread of its own:

    issue       ordered after every store that a commit_smem precedes; other stores race
    completion  a store between issue and completion races, and so does a later one by a thread
                that is not told of the completion

What forgets a wait, waits for too few, or gives an operand's slot away too early is then a race.
"""

import collections
import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

# The interpreter drops `wgmma_wait(n)` before any callback sees it, so it travels as the wait for
# stores, which no kernel lets reach this number.
WAIT = 1 << 16


@contextlib.contextmanager
def asynchronous() -> Iterator[None]:
    """Kernels traced and run within it have asynchronous products."""
    products = Products()
    wait_for_stores = plgpu.wait_smem_to_gmem
    with (
        mock.patch.object(gpu_callbacks, "wgmma", products.issue),
        mock.patch.object(gpu_callbacks, "wait_smem_to_gmem", products.wait),
        mock.patch.object(gpu_callbacks, "wgmma_accumulator_deref", products.read),
        mock.patch.object(gpu_callbacks, "kernel_thread_finished", products.end),
        mock.patch.object(plgpu, "wgmma_wait", lambda n: wait_for_stores(WAIT + n)),
    ):
        yield


class Products:
    """The callbacks in place of the interpreter's, and each thread's products in flight."""

    def __init__(self):
        self.in_flight = collections.defaultdict(collections.deque)
        self.multiply = gpu_callbacks.wgmma
        self.wait_for_stores = gpu_callbacks.wait_smem_to_gmem
        self.read_accumulator = gpu_callbacks.wgmma_accumulator_deref
        self.end_thread = gpu_callbacks.kernel_thread_finished
        for name in ("issue", "wait", "read", "end"):  # a method cannot be decorated by it
            setattr(self, name, gpu_callbacks.fail_on_exception(getattr(self, name)))

    def issue(self, *, token, thread, **arguments):
        """wgmma: nothing is computed yet."""
        memory = gpu_callbacks._get_shared_memory()
        clock, number = None, None
        if memory.detect_races:
            memory.incr_clock(thread)
            clock, number = memory.get_clock(thread), memory.get_next_tma_thread_id()
        arguments |= {"token": token, "thread": thread}
        self.check_reads(arguments, clock, number)
        self.in_flight[thread].append((arguments, clock, number))
        return token

    def wait(self, *, token, thread, n, **arguments):
        """wait_smem_to_gmem(n), or wgmma_wait(n - WAIT): all but the last so many complete."""
        if n < WAIT:
            return self.wait_for_stores(token=token, thread=thread, n=n, **arguments)
        self.complete(thread, all_but=n - WAIT)
        return token

    def read(self, *, token, thread, **arguments):
        """Reading an accumulator waits for all products."""
        self.complete(thread, all_but=0)
        return self.read_accumulator(token=token, thread=thread, **arguments)

    def end(self, *, token, thread, **arguments):
        """The end of a thread."""
        if self.in_flight[thread]:
            raise ValueError(f"{thread} ended before its wgmma did: wgmma_wait(0) is missing")
        return self.end_thread(token=token, thread=thread, **arguments)

    def complete(self, thread, *, all_but: int):
        """Computes the oldest products, and tells the thread that they are over."""
        memory = gpu_callbacks._get_shared_memory()
        while len(self.in_flight[thread]) > all_but:
            arguments, clock, number = self.in_flight[thread].popleft()
            self.check_reads(arguments, clock, number)
            self.multiply(**arguments)
            if clock is not None:
                with memory.lock:
                    memory.clocks[thread].update(clock)

    def check_reads(self, arguments, clock, number):
        """Both operands are read now; a race raises, or is recorded, as jax's version does it."""
        if clock is None:
            return
        memory = gpu_callbacks._get_shared_memory()
        clock.inc(number)
        for operand in "ab":
            key = gpu_callbacks.HostAllocationKey.from_array(
                arguments[f"{operand}_allocation_key_as_array"]
            )
            transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{operand}_transforms"])
            gpu_callbacks.get_races().check_read(
                arguments["thread"],
                clock.async_smem_clock.copy(),
                key,
                memory.access(key, jax.tree.map(int, transforms)),
                source_info=arguments["source_info"],
            )

"""What the interpreter, which copies by TMA, cannot see of the Ampere kernel's copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import ampere
from pallas_kernels.nf4_matmul.on_gpu import OnGpu
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.nf4_matmul.work import Kernel, share

AMPERE = OnGpu("ampere")
DIRECTIONS = {"forward": False, "backward": True}
OUT, WIDTH = 320, 256  # of W


def like(out, width):
    """A weight of shapes."""
    codes = jax.ShapeDtypeStruct((out, width // 2), jnp.uint8)
    scales = jax.ShapeDtypeStruct((out * width // 64,), jnp.float32)
    return Weight(codes, scales, (out, width), "nf4", 64, "bnb")


def pipeline(transposed):
    """(specs, shapes of the arrays that they copy from) of a product of 200 rows."""
    n, contraction = (WIDTH, OUT) if transposed else (OUT, WIDTH)
    work = share(2, -(-n // 128), contraction // 64, 4)
    k = Kernel(work, 128, 3, (200, n), jnp.dtype("bfloat16"), 0, transposed, False)
    codes, scales, _ = jax.eval_shape(lambda w: ampere.w_operands(k, w), like(OUT, WIDTH))
    return ampere.in_specs(k, 0), [(200, contraction), codes.shape, scales.shape]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_untiled_copies_are_of_contiguous_memory(direction):
    """Mosaic's cp.async takes an untiled block for contiguous; only tiled ones know strides."""
    specs, shapes = pipeline(DIRECTIONS[direction])
    tiled = [spec for spec in specs if spec.transforms]
    assert len(tiled) == 2  # x and codes, which are rows of wider arrays
    for spec, shape in zip(specs, shapes, strict=True):
        if not spec.transforms:
            block = [1 if size is None else size for size in spec.block_shape]
            places = np.arange(np.prod(shape)).reshape(shape)[tuple(slice(b) for b in block)]
            np.testing.assert_array_equal(places.reshape(-1), np.arange(places.size))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_steps_are_so_many_blocks_of_each_array(direction):
    """cp.async has no bounds: the last step's block ends where the array does."""
    transposed = DIRECTIONS[direction]
    specs, shapes = pipeline(transposed)
    steps = (OUT if transposed else WIDTH) // 64
    for spec, shape in zip(specs, shapes, strict=True):
        last = spec.index_map(np.int32(steps - 1))
        block = [1 if size is None else size for size in spec.block_shape]
        (axis,) = [i for i, place in enumerate(last) if place == steps - 1]
        assert (last[axis] + 1) * block[axis] == shape[axis]


@pytest.mark.parametrize("name", gpu.KNOWN)
@pytest.mark.parametrize("m", [0, 1, 32, 33, 64, 96, 128, 129, 200, 256, 4096])
def test_two_blocks_fit_a_multiprocessor(name, m):
    target = gpu.KNOWN[name]
    rows, stages = ampere.tile(target, m)
    tiles = -(-max(m, 1) // 128)
    assert rows in (32, 64, 96, 128)
    assert tiles * rows >= m
    assert rows == 32 or tiles * (rows - 32) < m
    assert stages >= 2
    shared = stages * (rows * 64 * 2 + 128 * 64 // 2 + 128 * 4)
    assert shared <= target.shared_bytes
    assert 2 * (shared + 1024) <= target.shared_bytes_sm


def test_once_keeps_each_column_of_overlapping_tiles():
    columns = np.arange(200)
    tiles = np.concatenate([columns[:128], columns[-128:]])[None]
    np.testing.assert_array_equal(ampere.once(jnp.asarray(tiles), 1, 128, 200)[0], columns)


def test_an_output_that_is_not_whole_steps_is_refused_backward():
    dy = jax.ShapeDtypeStruct((128, 200), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    with gpu.pretend(gpu.KNOWN["a100"], interpret=True):
        with pytest.raises(Unsupported, match=r"\(200, 256\): dy W takes 64 rows of W at a time"):
            jax.eval_shape(AMPERE.backward, dy, like(200, 256))
        assert jax.eval_shape(AMPERE.forward, x, like(200, 256)).shape == (128, 200)


def test_no_rows_are_no_rows():
    with gpu.pretend(gpu.KNOWN["a100"], interpret=True):
        x = jax.ShapeDtypeStruct((0, 256), jnp.bfloat16)
        assert jax.eval_shape(AMPERE.forward, x, like(128, 256)).shape == (0, 128)

"""Causal attention by cuDNN's kernels, which keep scores in registers, where cuDNN takes the input.

What holds, by jax 0.12.0.1's own checks when forward and backward are compiled for A100, RTX 4090,
H100, H200 and B200 (0.11.2 has the same checks, but for the last line):

    causal, grouped heads    yes, without repeating keys and values
    dtype                    bfloat16 and float16; float32 is refused
    head_dim                 a multiple of 8, up to 128; up to 256 on Hopper
    length                   even: jax refuses an odd one as soon as there is a gradient
    packed segments          no. jax.nn's call takes a length a row and no segments. As a mask they
                             are S x S in memory; the packed layout behind the call is private, for
                             Hopper and later, and wants a fixed number of segments
    sliding window           yes, where all layers have the same
    soft-capping             no: jax 0.12 alone, for Hopper and later, behind the call. As above

A compiler without the GPU does not ask cuDNN itself: it takes a head_dim of 1000. So on the GPU
this file compiles both directions once, before it says yes.

cuDNN adds the parts of dq in no fixed order, so a gradient's last bits vary from run to run;
XLA_FLAGS=--xla_gpu_deterministic_ops=true asks XLA for an order, here and everywhere.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from qlora_jax.models.scores import PLAIN, Scores

DTYPES = ("bfloat16", "float16")


def cudnn_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | None = None,
    scores: Scores = PLAIN,
) -> Float[Array, "B S H head_dim"]:
    """softmax(scores) v over the earlier tokens of each row.

    Raises:
      Unsupported: a condition of the table above does not hold, or jax, XLA or cuDNN refuses.
    """
    target = gpu.here()
    if target is None:
        raise Unsupported(f"the default device is a {jax.default_backend()}, not an NVIDIA GPU")
    if target.interpret:
        raise Unsupported("a library of the GPU cannot be interpreted on a CPU")
    if segment_ids is not None:
        raise Unsupported("packed segments would be a mask of S x S numbers in memory")
    if window is not None:
        raise Unsupported("layers with and without a window share one program")
    if scores.softcap is not None:
        raise Unsupported("scores have a soft cap")
    if q.dtype.name not in DTYPES:
        raise Unsupported(f"the dtype is {q.dtype}, not {' or '.join(DTYPES)}")
    length, size, limit = q.shape[1], q.shape[3], widest_head(target.gpu.capability)
    if size % 8 or size > limit:
        raise Unsupported(f"head_dim is {size}, not a multiple of 8 up to {limit}")
    if length % 2:
        raise Unsupported(f"the length is {length}, not even")
    absent = gpu.pretended.get() is not None
    if refusal := refusal_of_jax(q.shape, k.shape, q.dtype.name, scores, absent):
        raise Unsupported(refusal)
    return attend(q, k, v, scores)


def widest_head(capability: tuple[int, int]) -> int:
    """The largest head_dim whose gradient cuDNN computes.

    Sources: jax's check (256 from 9.0 on); cuDNN's support matrix, by which Blackwell's gradient
    has that width only in the newest versions.
    """
    return 256 if capability == (9, 0) else 128


@functools.cache
def refusal_of_jax(
    q: tuple[int, ...], k: tuple[int, ...], dtype: str, scores: Scores, absent: bool
) -> str | None:
    """Why forward and backward do not compile for arrays of these shapes; None if they do.

    For an absent GPU they are only traced, which finds whether cuDNN is installed.
    """

    def both(q, k, v, dy):
        y, back = jax.vjp(functools.partial(attend, scores=scores), q, k, v)
        return y, back(dy)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (q, k, k, q)]
    try:
        if absent:
            jax.eval_shape(both, *shapes)
        else:
            jax.jit(both).lower(*shapes).compile()
    except RuntimeError as error:  # NotImplementedError and XLA's errors among them
        return " ".join(str(error).split())[:200]
    return None


def attend(q: Array, k: Array, v: Array, scores: Scores) -> Array:
    """jax's call; its window counts the tokens before one's own."""
    before = None if scores.window is None else (scores.window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scores.scale,
        is_causal=True,
        local_window_size=before,
        implementation="cudnn",
    )

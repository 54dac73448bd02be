"""What benchmarks/kernels.py times: each op at a case, by our backends and by XLA alone."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import choices
from pallas_kernels.backends import dispatch, explain
from pallas_kernels.cross_entropy.api import cross_entropy
from pallas_kernels.dequantize import api as dequantize_api
from pallas_kernels.lora_matmul import api as lora_api
from pallas_kernels.nf4_matmul import api, reference
from pallas_kernels.nf4_matmul.cases import Case
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.quantize.api import DoubleQuantized
from qlora_jax.models import attention as model_attention

# In bfloat16, of what is rounded once more on its way: the thin product, the probabilities.
ROUNDED_TWICE = 8e-3
BLOCK = 64
RANK = 16  # of the adapter
TRANSPOSED = (((1,), (1,)), ((), ()))  # x W^T
AS_IT_LIES = (((1,), (0,)), ((), ()))  # x W


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a result.

    Attributes:
      name: of the backend, or of the peer.
      call: (x, weight) to the result.
      store: a Weight to the form that this contender keeps in memory.
      ours: whether it is a backend of pallas_kernels.
    """

    name: str
    call: Callable[[Any, Any], Any]
    store: Callable[[Weight], Any] = lambda w: w
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """One op at one case.

    Attributes:
      op: its name.
      case: the shapes.
      direction: forward, backward (the gradient alone) or both.
      x: what all weights are multiplied by, as `call` takes it.
      weight: makes what takes turns, of a seed: a Weight, a dense head, keys and values.
      exact: the float32 result for (x, weight).
      flops: multiplications and additions of a call.
      moved: bytes of what is read and written beside the weight.
      chosen: the backend that the op takes by itself.
      allowed: relative error, norm over norm.
      contenders: to be timed.
    """

    op: str
    case: Case
    direction: str
    x: Any
    weight: Callable[[int], Any]
    exact: Callable[[Any, Any], Any]
    flops: float
    moved: int
    chosen: str | None
    contenders: tuple[Contender, ...]
    allowed: float = 4e-3  # table, scale, their product and the result: 2^-9 each, at most


@functools.partial(jax.jit, static_argnames=("shape", "double"))
def random_weight(seed: int, *, shape: tuple[int, int], double: bool) -> Weight:
    """All codes alike often, scales of 0.02 to 0.08, as a stored NF4 matrix."""
    out, width = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.bits(keys[0], (out, width // 2), jnp.uint8)
    blocks = (out, width // BLOCK)
    if double:
        nested = jax.random.uniform(keys[1], (-(-out * width // BLOCK // 256),), minval=0.02)
        scale_codes = jax.random.bits(keys[2], blocks, jnp.uint8)
        scales = DoubleQuantized(scale_codes, nested * 0.03, jnp.float32(0.05))
    else:
        scales = jax.random.uniform(keys[1], blocks, minval=0.02, maxval=0.08)
    return Weight(codes, scales, shape, "nf4", BLOCK, "bnb")


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Activations, gradients, an adapter."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def multiply(x: jax.Array, w: jax.Array, dimensions: tuple) -> jax.Array:
    """A dense product in the dtype of its operands, accumulated in float32 on a GPU."""
    return jax.lax.dot_general(x, w, dimensions)


def exactly(x: jax.Array, w: jax.Array, dimensions: tuple) -> jax.Array:
    """The product of the values as they are, in float32 and without its fast, short forms."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jax.lax.dot_general(x, w, dimensions, precision=jax.lax.Precision.HIGHEST)


def dense(w: Weight, dtype=jnp.bfloat16) -> jax.Array:
    """W by the plain reference."""
    return reference.dense(w, dtype)


def nf4_matmul(case: Case, direction: str, *, double: bool) -> Problem:
    """x W^T, or dy W backward."""
    forward = direction == "forward"
    asked = api.FORWARD if forward else api.BACKWARD
    dimensions = TRANSPOSED if forward else AS_IT_LIES
    x = normal(0, case.m, case.k if forward else case.n)
    weight = functools.partial(random_weight, shape=case.shape, double=double)

    def backend(name: str) -> Contender:
        return Contender(name, functools.partial(dispatch, asked, backend=name), ours=True)

    def after_dequantizing(x, w):
        return multiply(x, jax.lax.optimization_barrier(dequantized(w)), dimensions)

    return Problem(
        op="nf4_matmul",
        case=case,
        direction=direction,
        x=x,
        weight=weight,
        exact=lambda x, w: exactly(x, dense(w, jnp.float32), dimensions),
        flops=2 * case.m * case.n * case.k,
        moved=2 * case.m * (case.n + case.k),
        chosen=explained("nf4_matmul", weight, normal(0, case.m, case.k), direction),
        contenders=(
            *(backend(name) for name, _ in asked),
            Contender("bf16", lambda x, w: multiply(x, w, dimensions), dense),
            Contender("dequantize + bf16", after_dequantizing),
            *qwix_if_installed(dimensions),
        ),
    )


def dequantized(w: Weight) -> jax.Array:
    """W in bfloat16 by the op's own choice of backend."""
    return dequantize_api.dequantize_4bit(
        w.codes, w.scales, shape=w.shape, kind=w.kind, block_size=w.block_size, dtype=jnp.bfloat16
    )


def explained(op: str, weight: Callable[[int], Weight], x: jax.Array, direction: str) -> str | None:
    """The backend that nf4_matmul takes by itself."""
    w = jax.eval_shape(weight, 0)
    found = choices.explain(op, x, w.codes, w.scales, shape=w.shape)
    chosen = found.forward if direction == "forward" else found.gradient
    return chosen.backend if chosen else None


def qwix_if_installed(dimensions: tuple) -> Iterator[Contender]:
    """qwix's product of the same codes, which it keeps in uint4 with bfloat16 scales."""
    if importlib.util.find_spec("qwix") is None:
        return
    import qwix

    def store(w: Weight):
        codes = jnp.stack([w.codes >> 4, w.codes & 15], -1).reshape(w.shape).astype(jnp.uint4)
        scales = dequantize_api.expand_scales(w.scales).astype(jnp.bfloat16)
        return qwix.QArray(codes, scales.reshape(w.shape[0], -1), None, "nf4")

    yield Contender("qwix", lambda x, w: qwix.dot_general(x, w, dimensions), jax.jit(store))


def dequantize(case: Case, *, double: bool) -> Problem:
    """W in bfloat16."""
    weight = functools.partial(random_weight, shape=case.shape, double=double)

    def backend(name: str | None):
        return lambda _, w: dequantize_api.dequantize_4bit(
            w.codes, w.scales, shape=w.shape, dtype=jnp.bfloat16, backend=name
        )

    w = jax.eval_shape(weight, 0)
    static = {"shape": case.shape, "dtype": jnp.bfloat16}
    return Problem(
        op="dequantize",
        case=case,
        direction="forward",
        x=jnp.zeros(()),
        weight=weight,
        exact=lambda _, w: dense(w, jnp.float32),
        flops=0,
        moved=2 * case.n * case.k,
        chosen=choices.explain("dequantize", w.codes, w.scales, **static).forward.backend,
        contenders=tuple(
            Contender(name, backend(name), ours=True) for name, _ in dequantize_api.BACKENDS
        ),
    )


def with_gradient(product: Callable[..., jax.Array], arguments: tuple, dy: jax.Array) -> tuple:
    """(y, the gradients of the arguments), as a training step computes both."""
    y, pull_back = jax.vjp(product, *arguments)
    return y, pull_back(dy)


def lora_matmul(case: Case, *, double: bool) -> Problem:
    """x W^T + s (x A^T) B^T, and the gradients of x, A and B^T."""
    weight = functools.partial(random_weight, shape=case.shape, double=double)
    a, b = (normal(i, RANK, n, dtype=jnp.float32) for i, n in enumerate((case.k, case.n)))
    x, scale = normal(2, case.m, case.k), jnp.float32(0.01)

    def backend(name: str | None):
        def call(given, w):
            def product(x, a, b):
                return lora_api.lora_matmul(
                    x, w.codes, w.scales, a, b, scale, shape=w.shape, backend=name
                )

            return with_gradient(product, *given)

        return call

    def composed(given, w, product=multiply):
        def sum_of_two(x, a, b):
            h = product(x, a.astype(x.dtype), TRANSPOSED)
            low = product(h, (scale * b).astype(x.dtype), AS_IT_LIES)
            return product(x, w, TRANSPOSED) + low

        return with_gradient(sum_of_two, *given)

    def exact(given, w):
        given = jax.tree.map(lambda array: array.astype(jnp.float32), given)
        return composed(given, dense(w, jnp.float32), exactly)

    w = jax.eval_shape(weight, 0)
    arrays = (x, w.codes, w.scales, a, b, scale)
    return Problem(
        op="lora_matmul",
        case=case,
        direction="both",
        x=((x, a, b), normal(3, case.m, case.n)),
        weight=weight,
        exact=exact,
        # Twice the product of W, and of A and B twice each: forward, and for x and for themselves.
        flops=4 * case.m * case.n * case.k + 6 * case.m * RANK * (case.n + case.k),
        moved=2 * case.m * (2 * case.n + 2 * case.k),
        chosen=choices.explain("lora_matmul", *arrays, shape=case.shape).forward.backend,
        contenders=(
            *(Contender(name, backend(name), ours=True) for name, _ in lora_api.BACKENDS),
            Contender("bf16", composed, dense),
        ),
        allowed=ROUNDED_TWICE,
    )


def head_loss(case: Case) -> Problem:
    """The loss of a dense head and the gradient of x, by chunks and with all logits in memory."""
    x = normal(0, case.m, case.k)
    labels = jax.random.randint(jax.random.key(1), (case.m,), 0, case.n)

    def all_logits(x, head, product=multiply):
        def loss(x):
            logits = product(x, head, TRANSPOSED).astype(jnp.float32)
            target = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
            return (jax.nn.logsumexp(logits, axis=1) - target).sum()

        return jax.value_and_grad(loss)(x)

    def by_chunks(x, head):
        return jax.value_and_grad(lambda x: cross_entropy(x, head, labels).loss)(x)

    def head(seed: int) -> jax.Array:
        key = jax.random.key(seed)
        return jax.random.normal(key, case.shape, jnp.bfloat16) * jnp.bfloat16(case.k**-0.5)

    return Problem(
        op="cross_entropy",
        case=case,
        direction="both",
        x=x,
        weight=jax.jit(head),
        exact=lambda x, head: all_logits(x.astype(jnp.float32), head.astype(jnp.float32), exactly),
        flops=4 * case.m * case.n * case.k,
        moved=4 * case.m * case.k,
        chosen="chunks",
        contenders=(
            Contender("chunks", by_chunks, ours=True),
            Contender("all logits", all_logits),
        ),
        allowed=ROUNDED_TWICE,
    )


def attention(case: Case) -> Problem:
    """Causal attention, n = heads x 128 and k = key/value heads x 128, and its three gradients."""
    size = min(128, case.k)
    q, dy = (normal(i, 1, case.m, case.n // size, size) for i in range(2))

    def keys_and_values(seed: int) -> tuple[jax.Array, jax.Array]:
        shape = (2, 1, case.m, case.k // size, size)
        return tuple(jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))

    def backend(name: str) -> Contender:
        def call(given, kv):
            product = functools.partial(model_attention.causal_attention, backend=name)
            return with_gradient(product, (given[0], *kv), given[1])

        return Contender(name, call, ours=True)

    def all_scores(q, k, v):
        k, v = (jnp.repeat(a, case.n // case.k, axis=2) for a in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * size**-0.5
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")

    def exact(given, kv):
        q, dy, k, v = (a.astype(jnp.float32) for a in (*given, *kv))
        return with_gradient(all_scores, (q, k, v), dy)

    kv = jax.eval_shape(keys_and_values, 0)
    chosen = explain(model_attention.BACKENDS, q, *kv)
    return Problem(
        op="attention",
        case=case,
        direction="both",
        x=(q, dy),
        weight=jax.jit(keys_and_values),
        exact=exact,
        flops=7 * case.m**2 * case.n,  # half of two products forward and of five backward
        moved=2 * case.m * (4 * case.n + 2 * case.k),
        chosen=chosen.backend,
        contenders=tuple(backend(name) for name, _ in model_attention.BACKENDS),
        allowed=ROUNDED_TWICE,
    )

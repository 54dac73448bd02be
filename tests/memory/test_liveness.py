"""The simulation of a traced program: rules by small programs, and whole steps against XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.adapters.spec import make_spec
from qlora_jax.memory.liveness import peak_bytes
from qlora_jax.memory.program import Micro, arguments, traced
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import module_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.step import gradients
from tests.tiers import tiered
from tests.tolerances import PLANNED_TEMPORARIES

BOTH = tuple(jax.memory.Space)
X = jax.ShapeDtypeStruct((256, 256), jnp.float32)
ONE = 256 * 256 * 4


def peak(function, *arguments):
    return peak_bytes(jax.make_jaxpr(function)(*arguments), BOTH).nbytes


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (lambda x: x @ x, 0),  # the result is the caller's
        (lambda x: jnp.exp(x) * 2 + x, 0),  # fused into it
        (lambda x: (x + 1) @ x, 1),  # a product reads its operand from memory
        (lambda x: (x @ x) @ x, 1),
        (lambda x: jnp.sin((x @ x) @ x).sum(), 2),  # the second while the first is still there
        (lambda x: ((x @ x) @ (x @ x)).sum(), 3),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ x, x), 1),  # the next, beside the carry
        (lambda x: jax.lax.scan(lambda y, _: (y, y @ x), x, length=4)[1].sum(), 5),
        # The sine does not change from turn to turn: it is there while the loop runs.
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ jnp.sin(x), x), 2),
        (lambda x: jnp.zeros((4, 256, 256)).at[2].set(x).sum(), 4),  # in place
    ],
)
def test_a_rule(function, arrays):
    assert peak(function, X) == pytest.approx(arrays * ONE, abs=ONE // 100)


def test_what_nobody_reads_takes_no_memory():
    def function(x):
        _ = (x @ x) @ (x @ x)
        return x + 1

    assert peak(function, X) == 0


def test_a_scope_is_told_apart():
    def function(x):
        with jax.named_scope("inner"):
            a = x @ x
        return (a @ (x @ x)).sum()

    found = peak_bytes(jax.make_jaxpr(function)(X), BOTH, "inner")
    assert (found.nbytes, found.scoped) == (3 * ONE, ONE)


def test_host_memory_is_counted_apart():
    def function(x):
        kept = jax.device_put(x @ x, jax.memory.Space.Host)
        return (x @ (x @ x)).sum(), jax.device_put(kept, jax.memory.Space.Device).sum()

    program = jax.make_jaxpr(function)(X)
    assert peak_bytes(program, [jax.memory.Space.Host]).nbytes == ONE
    assert peak_bytes(program, [jax.memory.Space.Device]).nbytes > ONE


SMALL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def micro(rows=1, length=256, rank=8, **changes) -> Micro:
    shape = ModelConfig.from_dict(SMALL | changes)
    spec = make_spec(module_shapes(shape), shape.num_hidden_layers, r=rank)
    return Micro(shape, spec, QuantizationConfig(), "bfloat16", rows, length, None)


@pytest.mark.parametrize(
    ("case", "remat"),
    tiered(
        [
            (micro(), "none"),
            (micro(rank=64), "full"),
            (micro(rows=4, length=128), "none"),
            (micro(model_type="gemma2", head_dim=32, tie_word_embeddings=True), "none"),
        ],
        [(micro(rank=64), "full")],
    ),
)
def test_a_step_takes_what_xla_says(case, remat):
    params, model, batch, *_ = arguments(case, "off")
    step = functools.partial(gradients, spec=case.spec, remat=remat)
    compiled = step.func.lower(params, model, batch, **step.keywords).compile()
    real = compiled.memory_analysis().temp_size_in_bytes
    found = peak_bytes(traced(case, "off", remat), BOTH).nbytes
    np.testing.assert_allclose(found, real, rtol=PLANNED_TEMPORARIES)

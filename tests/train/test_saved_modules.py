"""Modules that are trained in full: the gradients of the loss are those of the logits."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.init import init_lora
from qlora_jax.models import Decoder
from qlora_jax.train.loss import loss_fn
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import golden_folder
from tests.tiers import tiered
from tests.tolerances import SAVED_GRADIENT_ATOL, SAVED_GRADIENT_RTOL, SAVED_LOSS_RTOL

LENGTH = 12


BOTH = ("lm_head", "embed_tokens")


def opened(family: str) -> Decoder:
    with open_source(golden_folder(f"models/{family}")) as source:
        return load_model(source, quantization=None, dtype="float32")


@pytest.mark.parametrize(
    ("family", "names"),
    tiered(
        product(["llama_tied", "gemma2"], [BOTH[:1], BOTH[1:], BOTH]),
        # gemma2: soft caps and a scale.
        [("llama_tied", BOTH[1:]), ("gemma2", BOTH[:1])],
    ),
)
def test_gradients_reach_saved_modules_through_loss_and_logits(family, names):
    model = opened(family)
    lora = init_lora(model, r=2, targets=["q_proj"], key=jax.random.key(0), modules_to_save=names)
    ids = jnp.arange(5, 5 + 2 * LENGTH, dtype=jnp.int32).reshape(2, LENGTH)

    @jax.jit
    @jax.value_and_grad
    def plain(params):
        logits = model(ids, adapter=Adapter(params, lora.spec))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).sum()

    batch = {"input_ids": ids, "labels": ids}
    ours = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="spec")
    (loss, _), found = ours(lora.params, model, batch, spec=lora.spec)
    wanted_loss, wanted = plain(lora.params)
    np.testing.assert_allclose(loss, wanted_loss, rtol=SAVED_LOSS_RTOL)
    for name in names:
        assert np.abs(wanted[name]["weight"]).max() > 1e-2
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=SAVED_GRADIENT_RTOL, atol=SAVED_GRADIENT_ATOL)

"""Weights in host memory, fetched layer by layer: the same numbers, bit for bit."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.adapters.init import init_lora
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.models import Decoder, KVCache, ModelConfig, layers
from qlora_jax.models.fingerprint import fingerprint
from qlora_jax.models.remat import POLICIES
from qlora_jax.placement import in_host, to_host
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.step import gradients, micro_gradients
from qlora_jax.weight_names import LAYERS, is_streamed
from tests.golden_data import golden_folder
from tests.random_arrays import normals_like
from tests.tiers import tiered
from tests.tiny_model import FEW_TARGETS
from tests.tolerances import VJP_ATOL, VJP_RTOL

FAMILIES = sorted(path.name for path in golden_folder("models").iterdir() if path.is_dir())


def opened(family: str, stream_weights: str = "off", quantization=None) -> Decoder:
    """The golden model twice over, four layers: a loop of one is no loop to XLA."""
    source = Shards(golden_folder("models") / family)
    config = dict(source.config)
    weights = load_weights(source, ModelConfig.from_dict(config), quantization, dtype="float32")
    config["num_hidden_layers"] *= 2
    if "layer_types" in config:
        config["layer_types"] *= 2
    for name, weight in weights.items():
        if name.startswith(LAYERS):
            weight = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), weight)
        weights[name] = to_host(weight) if is_streamed(name, stream_weights) else weight
    return Decoder.from_weights(ModelConfig.from_dict(config), weights, "float32")


def adapter(model: Decoder, **settings):
    """An adapter that changes something, where a new one has B = 0."""
    lora = init_lora(model, r=4, alpha=8, key=jax.random.key(0), **settings)
    moves = normals_like(lora.params, 1, size=0.01)
    return lora.spec, jax.tree.map(jnp.add, lora.params, moves)


def batch(model: Decoder, rows: int = 2, length: int = 24):
    ids = np.random.RandomState(0).randint(3, model.config.vocab_size, (rows, length))
    positions = np.broadcast_to(np.arange(length), ids.shape)
    segments = np.where(positions < 10, 1, 2) * (positions < 22)
    arrays = {"input_ids": ids, "labels": ids, "positions": positions, "segment_ids": segments}
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def assert_equal(tree, other):
    for (path, a), b in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        assert not in_host(a)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def assert_near(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=VJP_RTOL, atol=VJP_ATOL)


@pytest.mark.fully_compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "remat"),
    [
        *((family, "full") for family in FAMILIES if family != "qwen3"),
        *(("qwen3", remat) for remat in POLICIES),
    ],
)
def test_gradients_of_every_family(family, remat):
    resident, streamed = opened(family), opened(family, "on")
    spec, params = adapter(resident)
    found = [
        gradients(params, model, batch(model), spec=spec, remat=remat)
        for model in (resident, streamed)
    ]
    assert float(jnp.abs(found[0].grads["mlp.down_proj"]["A"]).max()) > 0
    assert_equal(*found)


@pytest.mark.parametrize(
    "remat", tiered([policy for policy in POLICIES if policy != "none"], ["save-attention"])
)
def test_policies_agree(remat):
    model = opened("llama")
    spec, params = adapter(model, targets=FEW_TARGETS)
    kept, computed_again = (
        gradients(params, model, batch(model), spec=spec, remat=policy)
        for policy in ("none", remat)
    )
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(computed_again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


IN_FULL = {"modules_to_save": ("embed_tokens", "lm_head")}
SETTINGS = {
    "nothing is computed again": ("none", {}),
    "dropout": ("full", {"dropout": 0.3}),
    "DoRA": ("full", {"use_dora": True}),
    "embeddings and head in full": ("offload", IN_FULL),
    "DoRA, embeddings and head in full": (
        "offload",
        {"use_dora": True, **IN_FULL, "targets": FEW_TARGETS},
    ),
}


@pytest.mark.fully_compiled
@pytest.mark.parametrize(
    ("setting", "family", "stream_weights"),
    tiered(
        product(SETTINGS, ["llama", "gemma2"], ["on", "all"]),
        [("DoRA, embeddings and head in full", "llama", "on")],
    ),
)
def test_gradients_of_every_kind_of_adapter(setting, family, stream_weights):
    remat, settings = SETTINGS[setting]
    how = QuantizationConfig()
    resident, streamed = opened(family, "off", how), opened(family, stream_weights, how)
    spec, params = adapter(resident, **settings)
    key = jax.random.key(7) if "dropout" in settings else None
    found = [
        gradients(params, model, batch(model), spec=spec, remat=remat, dropout_key=key)
        for model in (resident, streamed)
    ]
    if stream_weights == "all" and "modules_to_save" not in settings:
        # The head's loss goes over blocks of the vocabulary, in another order of sums.
        assert_near(*found)
    else:
        assert_equal(*found)


@pytest.mark.parametrize("family", tiered(["llama", "gemma2"], ["gemma2"]))
def test_logits_with_and_without_a_cache(family):
    resident, streamed = opened(family), opened(family, "all")
    assert in_host(streamed.layers)
    assert in_host(streamed.embed_tokens)
    ids = batch(resident)["input_ids"]
    assert_near(jax.jit(resident)(ids), jax.jit(streamed)(ids))
    caches = [
        jax.jit(model)(ids, cache=KVCache.create(model.config, 2, 32, "float32"))
        for model in (resident, streamed)
    ]
    assert_near(*caches)


@pytest.mark.slow
def test_generation_and_fingerprint():
    resident, streamed = opened("qwen3"), opened("qwen3", "all")
    assert fingerprint(resident) == fingerprint(streamed)
    written = [
        list(generate_tokens(model, [5, 6, 7], max_new_tokens=6, seed=3))
        for model in (resident, streamed)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("remat", POLICIES)
def test_no_weight_is_kept_for_the_backward(remat, monkeypatch):
    model = opened("llama", "on", QuantizationConfig())
    spec, params = adapter(model)
    kept = []
    loop = layers.forward_loop

    def watched(*args):
        found = loop(*args)
        kept.extend(jax.tree.leaves(found[1]))
        return found

    monkeypatch.setattr(layers, "forward_loop", watched)
    jax.eval_shape(
        lambda p, m, b: micro_gradients(p, m, b, spec=spec, remat=remat),
        params,
        model,
        batch(model),
    )
    assert kept
    sizes = {leaf.shape[1:] for leaf in kept}
    if remat in ("full", "offload"):
        assert sizes == {(2, 24, model.config.hidden_size)}
    assert not [leaf for leaf in kept if leaf.dtype == jnp.uint8]
    assert all(in_host(leaf) == (remat == "offload") for leaf in kept)

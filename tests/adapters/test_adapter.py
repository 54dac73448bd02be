import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.lora_matmul import lora_delta
from qlora_jax.adapters.adapter import Adapter, check_finite
from qlora_jax.adapters.init import init_adapter, init_lora
from qlora_jax.adapters.spec import make_spec
from qlora_jax.errors import InputError
from qlora_jax.quantization.tensor import quantize
from tests.adapters.small_model import SmallModel
from tests.random_arrays import normal
from tests.tolerances import ROW_LENGTH_RTOL

KEY = jax.random.key(7)
UNEQUAL = {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}


def test_the_whole_tree():
    lora = init_lora(SmallModel(), r=4, targets=["q_proj", "down_proj"], key=KEY)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), lora.params)
    assert shapes == {
        "self_attn.q_proj": {"A": ((3, 4, 8), "float32"), "B": ((3, 16, 4), "float32")},
        "mlp.down_proj": {"A": ((3, 4, 12), "float32"), "B": ((3, 8, 4), "float32")},
    }
    assert lora.num_parameters == 3 * 4 * (8 + 16 + 12 + 8)
    assert lora.nbytes == 4 * lora.num_parameters


def model_with_weights(**weights) -> SmallModel:
    """Random weights; of the linears q_proj alone, in 4 bits."""
    q = jax.vmap(quantize)(normal(0, 3, 128, 64))
    embedding = normal(1, 9, 8, dtype="bfloat16")
    held = {"model.embed_tokens.weight": embedding, "model.layers.self_attn.q_proj.weight": q}
    return SmallModel(held | weights, {"self_attn.q_proj": (128, 64)})


def test_dora_begins_with_the_lengths_of_the_bases_rows():
    model = model_with_weights()
    lora = init_lora(model, r=4, use_dora=True, key=KEY, rank_pattern={"layers.1.*": 2})
    dense = model.held["model.layers.self_attn.q_proj.weight"].dequantize("float32")
    m = lora.params["self_attn.q_proj"]["m"]
    np.testing.assert_allclose(m, np.linalg.norm(dense, axis=2), rtol=ROW_LENGTH_RTOL)
    assert lora.num_parameters == (4 + 2 + 4) * (64 + 128) + 3 * 128
    other = init_lora(model, r=4, use_dora=True, key=KEY, targets=["layers.1.self_attn.q_proj"])
    assert not other.params["self_attn.q_proj"]["m"][::2].any()  # no adapter, nothing to train
    assert other.num_parameters == 4 * (64 + 128) + 128


def test_modules_to_save_begin_as_float32_copies_of_the_bases():
    tied, head = model_with_weights(), quantize(jnp.ones((9, 8)), block_size=32)
    own = model_with_weights(**{"lm_head.weight": head})
    names = ["embed_tokens", "lm_head"]
    for model, wanted in ((tied, tied.held["model.embed_tokens.weight"]), (own, jnp.ones((9, 8)))):
        lora = init_lora(model, r=2, modules_to_save=names, key=KEY)
        assert lora.spec.modules_to_save == ("lm_head", "embed_tokens")
        saved = [lora.params[name]["weight"] for name in lora.spec.modules_to_save]
        assert all(weight.dtype == jnp.float32 for weight in saved)
        np.testing.assert_array_equal(saved[0], wanted.astype(jnp.float32))
        np.testing.assert_array_equal(saved[1], tied.held["model.embed_tokens.weight"])
        assert lora.num_parameters == 3 * 2 * (64 + 128) + 2 * 9 * 8
    wide = SmallModel({"model.embed_tokens.weight": jnp.ones((9, 8))}, tied.shapes)
    copy = init_lora(wide, r=2, modules_to_save=names, key=KEY).params["lm_head"]["weight"]
    copy.delete()  # as a step that takes its parameters over does
    assert wide.held["model.embed_tokens.weight"].sum() == 72


def test_padding_counts_as_bytes_and_not_as_parameters():
    lora = init_lora(SmallModel(), **UNEQUAL, targets=["q_proj"], key=KEY)
    assert lora.num_parameters == (4 + 2 + 4) * (8 + 16)
    assert lora.nbytes == 4 * 3 * 4 * (8 + 16)


@pytest.mark.usefixtures("strict_promotion")
def test_the_beginning_is_pefts():
    model = SmallModel(shapes={"wide": (3, 400)})
    lora = init_adapter(model, make_spec(model.module_shapes(), 3, r=500), KEY)
    A = np.asarray(lora.params["wide"]["A"])
    bound = 1 / np.sqrt(400)
    assert not lora.params["wide"]["B"].any()
    assert np.abs(A).max() <= np.float32(bound)
    # 600,000 uniform numbers: the standard error of each of the two is 1e-3 of the bound or less.
    assert abs(A.mean()) < 5e-3 * bound
    assert abs(A.std() / (bound / np.sqrt(3)) - 1) < 5e-3
    assert len(np.unique(A)) > 0.9 * A.size  # layers and rows are not copies of each other


def test_a_rows_numbers_depend_on_key_name_and_layer_alone():
    def A(**settings):
        return init_lora(SmallModel(), key=KEY, **settings).params["mlp.up_proj"]["A"]

    alone, among = A(r=4, targets=["up_proj"]), A(r=4)
    np.testing.assert_array_equal(alone, among)
    np.testing.assert_array_equal(alone, A(r=6, targets=["up_proj"])[:, :4])
    np.testing.assert_array_equal(
        alone[1:], A(r=4, rank_pattern={"layers.0.mlp.up_proj": 9})[1:, :4]
    )
    other = init_lora(SmallModel(), r=4, key=jax.random.key(8)).params["mlp.up_proj"]["A"]
    assert not np.array_equal(alone, other)


def test_the_first_numbers_stay_what_they_are():
    # Runs are repeatable across versions of this project only while these hold.
    lora = init_lora(SmallModel(), r=2, targets=["q_proj"], key=jax.random.key(0))
    first = np.asarray(lora.params["self_attn.q_proj"]["A"])[:2, :, 0]
    wanted = [[0.08243443, 0.14102301], [-0.21828915, -0.34281698]]
    np.testing.assert_array_equal(first, np.float32(wanted))


def test_layers_are_cut_to_their_rank():
    lora = init_lora(SmallModel(), **UNEQUAL, targets=["q_proj"], key=KEY)
    chex.assert_shape(lora.layer("self_attn.q_proj", 0), [(4, 8), (16, 4)])
    chex.assert_shape(lora.layer("self_attn.q_proj", 1), [(2, 8), (16, 2)])
    np.testing.assert_array_equal(lora.params["self_attn.q_proj"]["A"][1, 2:], np.zeros((2, 8)))


def test_padding_stays_zero_and_scales_stay_put_under_adamw():
    lora = init_lora(SmallModel(), **UNEQUAL, targets=["q_proj"], key=KEY)
    scales = lora.spec.scales("self_attn.q_proj").copy()
    x = normal(1, 5, 8)
    tx = optax.adamw(1e-2, weight_decay=0.1)

    def loss(adapter: Adapter):
        pair, scale = adapter.params["self_attn.q_proj"], adapter.spec.scales("self_attn.q_proj")
        y = jax.vmap(lora_delta, (None, 0, 0, 0))(x, pair["A"], pair["B"].swapaxes(1, 2), scale)
        return jnp.sum((y - 1) ** 2)

    state = tx.init(lora)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        lora = optax.apply_updates(lora, updates)
    A, B = lora.params["self_attn.q_proj"].values()
    assert B[1, :, :2].all()  # it has learned
    assert not A[1, 2:].any()
    assert not B[1, :, 2:].any()
    np.testing.assert_array_equal(lora.spec.scales("self_attn.q_proj"), scales)


def test_one_compile_for_specs_that_adapt_alike():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def total(adapter):
        return sum(leaf.sum() for leaf in jax.tree.leaves(adapter.params))

    total(init_lora(SmallModel(), r=4, targets=["q_proj"], key=KEY))
    total(init_lora(SmallModel(), r=4, targets=r".*\.q_proj", key=KEY))


def test_a_value_that_is_not_finite_is_named():
    lora = init_lora(SmallModel(), r=2, targets=["q_proj"], key=KEY)
    params = lora.params["self_attn.q_proj"]
    spoiled = Adapter(
        {"self_attn.q_proj": dict(params, B=params["B"].at[1, 3, 0].set(jnp.nan))}, lora.spec
    )
    where = r"model\.layers\.1\.self_attn\.q_proj\.lora_B: nan at \[3, 0\], not finite"
    with pytest.raises(InputError, match=where):
        check_finite(spoiled)
    lora = init_lora(model_with_weights(), r=2, modules_to_save=["lm_head"], key=KEY)
    head = lora.params["lm_head"]["weight"].at[4, 2].set(-jnp.inf)
    with pytest.raises(InputError, match=r"lm_head\.weight: -inf at \[4, 2\], not finite"):
        check_finite(Adapter(lora.params | {"lm_head": {"weight": head}}, lora.spec))

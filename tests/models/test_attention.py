"""Attention: both forms of the blocks against autodiff, their memory, and who is chosen and why."""

import functools
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from qlora_jax.models import attention, chunked_attention, cudnn_attention
from qlora_jax.models.cache import Stored
from qlora_jax.models.chunked_attention import Form, bands
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.scores import PLAIN, Scores
from tests.random_arrays import normal
from tests.tiers import tiered
from tests.tolerances import VJP_ATOL, VJP_RTOL


def plain_attention(q, k, v, segment_ids=None, scores=PLAIN):
    """Attention as the formula says it, with all scores at once."""
    length, size = q.shape[1], q.shape[3]
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if scores.window is not None:
        seen = seen & jnp.triu(jnp.ones((length, length), bool), 1 - scores.window)
    found = jnp.einsum("bshd,bthd->bhst", q, k) * (scores.scale or size**-0.5)
    if scores.softcap is not None:
        found = scores.softcap * jnp.tanh(found / scores.softcap)
    weights = jax.nn.softmax(jnp.where(seen[:, None], found, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


def case(length: int, packed: bool, rows: int = 2):
    shapes = ((rows, length, heads, 8) for heads in (6, 2, 2))
    q, k, v = (normal(seed, *shape) for seed, shape in enumerate(shapes))
    ids = jnp.sort(jax.random.randint(jax.random.key(3), (rows, length), 0, 3)) if packed else None
    return q, k, v, ids


def with_gradients(attend, args):
    weights = normal(99, *args[0].shape)

    def scalar(q, k, v, ids):
        y = attend(q, k, v, ids)
        return (y * weights).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(*args)
    return y, *grads


# Blocks of 4 rows, at most two bands: one block and 3 rows; three blocks, two, and 3 rows.
@pytest.mark.parametrize(
    ("by_products", "packed", "length"),
    tiered(
        product([False, True], [False, True], [7, 23]),
        [(False, True, 23), (True, True, 23), (True, False, 7)],
    ),
)
def test_each_form_equals_autodiff(monkeypatch, by_products, packed, length):
    form = Form(rows=4, by_products=by_products)
    monkeypatch.setattr(chunked_attention, "MOST_BANDS", 2)
    monkeypatch.setattr(chunked_attention, "form_here", lambda length: form)
    args = case(length, packed)
    ours = with_gradients(chunked_attention.chunked_attention, args)
    autodiff = with_gradients(plain_attention, args)
    for own, plain in zip(ours, autodiff, strict=True):
        np.testing.assert_allclose(own, plain, rtol=VJP_RTOL, atol=VJP_ATOL)


@pytest.mark.parametrize(
    ("packed", "window", "traced"),
    tiered(
        product([False, True], [1, 3, 8, 40], [False, True]),
        [(False, 1, False), (True, 3, True), (True, 8, False)],
    ),
)
def test_windows_and_soft_caps_equal_autodiff(monkeypatch, packed, window, traced):
    monkeypatch.setattr(chunked_attention, "MOST_BANDS", 3)
    form = Form(rows=4, by_products=True)
    monkeypatch.setattr(chunked_attention, "form_here", lambda length: form)
    args = case(23, packed)
    whole = Scores(scale=0.7, softcap=1.5, window=window)
    plain = with_gradients(functools.partial(plain_attention, scores=whole), args)
    own = {"scores": whole}
    if traced:
        own = {"scores": whole._replace(window=None), "window": jnp.int32(window)}
    ours = with_gradients(functools.partial(attention.causal_attention, **own), args)
    for found, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=VJP_RTOL, atol=VJP_ATOL)


def test_keys_before_every_window_are_left_out():
    scores = Scores(window=5)
    found = [band.keys(scores) for band in bands(32, 8)]
    assert found == [slice(0, 8), slice(4, 16), slice(12, 24), slice(20, 32)]


@pytest.mark.parametrize("window", tiered([1, 4, 30], [4]))
def test_a_cache_has_the_same_windows_and_caps(window):
    q, k, v, _ = case(12, packed=False)
    scores = Scores(softcap=1.5, window=window)
    expected = plain_attention(q, k, v, scores=scores)
    room = [Stored(jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, 3), (0, 0)))) for a in (k, v)]
    for first in (0, 7):
        length = jnp.full((2,), first)
        found = attention.cached_attention(q[:, first:], *room, length, scores=scores)
        np.testing.assert_allclose(found, expected[:, first:], rtol=VJP_RTOL, atol=VJP_ATOL)


def test_a_row_of_padding_alone_is_finite():
    q, k, v, _ = case(9, packed=False)
    for array in with_gradients(attention.causal_attention, (q, k, v, jnp.zeros((2, 9), int))):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("rows", [1, 4, 128])
@pytest.mark.parametrize("length", [1, 4, 127, 128, 129, 1024, 5000])
def test_bands_cover_every_row_once(length, rows):
    found = bands(length, rows)
    assert len(found) <= chunked_attention.MOST_BANDS + 1
    assert [row for b in found for row in range(b.start, b.stop)] == list(range(length))
    assert all((b.stop - b.start) % b.rows == 0 for b in found)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1024, 5000])
def test_a_cpu_unrolls_every_block(length):
    form = chunked_attention.form_here(length)
    found = bands(length, form.rows)
    assert form.by_products
    assert len(found) <= chunked_attention.MOST_BANDS
    assert all(b.stop - b.start == b.rows for b in found)


def test_a_gpu_has_blocks_of_its_own():
    with gpu.pretend(gpu.KNOWN["rtx4090"], interpret=False):
        form = chunked_attention.form_here(8192)
    assert form == Form(chunked_attention.GPU_ROWS, by_products=False)


def temporary_bytes(attend, length: int) -> int:
    shape = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)

    def loss(q, k, v):
        return attend(q, k, v).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("attend", "few"), [(chunked_attention.chunked_attention, True), (plain_attention, False)]
)
def test_scores_of_all_tokens_are_never_in_memory(monkeypatch, attend, few):
    length, heads = 2048, 4
    form = Form(rows=32, by_products=False)
    monkeypatch.setattr(chunked_attention, "form_here", lambda length: form)
    assert (temporary_bytes(attend, length) < 4 * heads * length**2 / 4) == few


def choice(
    name: str = "h100",
    interpret: bool = False,
    packed: bool = False,
    length=64,
    head_dim: int = 128,
    dtype="bfloat16",
    scores: Scores = PLAIN,
    traced: bool = False,
):
    q = jax.ShapeDtypeStruct((1, length, 4, head_dim), dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None
    window = jax.ShapeDtypeStruct((), jnp.int32) if traced else None
    with gpu.pretend(gpu.KNOWN[name], interpret=interpret):
        return attention.backends.explain(attention.BACKENDS, q, q, q, ids, window, scores=scores)


@pytest.fixture
def installed(monkeypatch):
    """As if jax had found cuDNN."""
    monkeypatch.setattr(cudnn_attention, "refusal_of_jax", lambda *asked: None)
    monkeypatch.setattr(cudnn_attention, "attend", lambda q, k, v, scores: q)


@pytest.mark.parametrize("name", gpu.KNOWN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_takes_plain_rows_on_every_gpu(installed, name, dtype):
    assert str(choice(name, dtype=dtype)) == "cudnn"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"packed": True}, "packed segments"),
        ({"dtype": "float32"}, "the dtype is float32, not bfloat16 or float16"),
        ({"head_dim": 100}, "head_dim is 100, not a multiple of 8 up to 256"),
        ({"head_dim": 264}, "head_dim is 264, not a multiple of 8 up to 256"),
        ({"head_dim": 136, "name": "rtx4090"}, "head_dim is 136, not a multiple of 8 up to 128"),
        ({"head_dim": 256, "name": "b200"}, "head_dim is 256, not a multiple of 8 up to 128"),
        ({"length": 63}, "the length is 63, not even"),
        ({"interpret": True}, "cannot be interpreted"),
        ({"scores": Scores(softcap=50.0)}, "scores have a soft cap"),
        ({"traced": True}, "layers with and without a window share one program"),
    ],
)
def test_blocks_take_the_rest_and_the_reason_is_kept(installed, asked, reason):
    chosen = choice(**asked)
    assert chosen.backend == "chunked"
    assert reason in str(chosen)


def test_a_wide_head_on_hopper(installed):
    assert choice("h100", head_dim=256).backend == "cudnn"


def test_cudnn_takes_a_window(installed):
    assert choice(scores=Scores(window=16)).backend == "cudnn"


def test_without_cudnn_jax_says_so():
    assert "not cudnn: cuDNN is not detected." in str(choice())


def test_what_does_not_compile_is_refused():
    shape = (1, 64, 4, 128)
    assert cudnn_attention.refusal_of_jax(shape, shape, "bfloat16", PLAIN, absent=False)


def test_on_a_cpu():
    fields = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    chosen = attention.explain(ModelConfig.from_dict(fields), 2, 16, jnp.bfloat16, packed=True)
    assert chosen.backend == "chunked"
    assert "the default device is a cpu, not an NVIDIA GPU" in str(chosen)


def test_a_named_backend_never_falls_back():
    q, k, v, ids = case(8, packed=False)
    with pytest.raises(Unsupported, match="the default device is a cpu"):
        attention.causal_attention(q, k, v, ids, backend="cudnn")

"""Next-token cross entropy as (sum, count): a step divides by the count of all micro batches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import CrossEntropy, cross_entropy
from pallas_kernels.nf4_matmul.weight import Weight, stored
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.on_top import on_top
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.linear import stored_as
from qlora_jax.placement import in_host
from qlora_jax.quantization.tensor import QuantizedTensor

Batch = Mapping[str, Array]
LOSS = "loss"  # the name under which profilers and the planner find it


def loss_fn(
    params: Any,
    model: Decoder,
    batch: Batch,
    *,
    spec: LoraSpec | None = None,
    frozen: Adapter | None = None,
    dropout_key: Array | None = None,
    remat: str = "none",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of -log p over the counted targets (nats, float32), and their count (int32).

        labels       -100  -100   12    7    2  -100     aligned with input_ids
        counted as            12    7    2    .    .     each token predicts the next one's label

    Differentiate with `jax.value_and_grad(loss_fn, has_aux=True)`: the gradient is that of the
    sum, so divide it by the count of the whole step.

    Args:
      params: an adapter's trainable tree; `{}` without a spec for the base model alone.
      model: the frozen base.
      batch: `input_ids` and `labels` (B, S) int32, -100 where a label does not count; optional
        `positions` and `segment_ids` (0 is padding), as the loader makes them.
      spec: the adapter's static part.
      frozen: an adapter that lies below it and has no gradient, see adapters/on_top.py.
      dropout_key: a key for the adapter's dropout; None in evaluation.
      remat: see `Decoder.hidden`.

    Source: the shift and the -100 of transformers' causal language models.
    """
    more = {"spec": spec, "frozen": frozen, "dropout_key": dropout_key, "remat": remat}
    sums, count = token_sums(params, model, batch, **more)
    return sums.loss, count


def token_sums(
    params: Any,
    model: Decoder,
    batch: Batch,
    *,
    spec: LoraSpec | None = None,
    frozen: Adapter | None = None,
    dropout_key: Array | None = None,
    remat: str = "none",
) -> tuple[CrossEntropy, Int[Array, ""]]:
    """As `loss_fn`, with the number of right guesses beside the loss."""
    adapter = None if spec is None else Adapter(params, spec)
    if frozen is not None:
        adapter = frozen if adapter is None else on_top(frozen, adapter)
    hidden = model.hidden(
        batch["input_ids"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        adapter=adapter,
        dropout_key=dropout_key,
        remat=remat,
    )
    return sums_of(hidden, model, batch["labels"], adapter)


@jax.named_scope(LOSS)
def sums_of(
    hidden: Float[Array, "B S D"],
    model: Decoder,
    labels: Int[Array, "B S"],
    adapter: Adapter | None,
) -> tuple[CrossEntropy, Int[Array, ""]]:
    """`token_sums` from the states behind the final norm on."""
    targets = next_labels(labels)
    sums = cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        as_loss_reads(model.head(adapter), hidden.dtype),
        targets.reshape(-1),
        softcap=model.config.logit_softcap,
        train_head=adapter is not None and "lm_head" in adapter.params,
    )
    return sums, (targets >= 0).sum().astype(jnp.int32)


def as_loss_reads(head: Array | QuantizedTensor, dtype: DTypeLike) -> Array | Weight:
    """The head in the activations' dtype, unless the loss makes that of it block by block."""
    if isinstance(head, QuantizedTensor):
        return stored(head.codes, head.absmax, **stored_as(head))
    return head if in_host(head) else head.astype(dtype)


def next_labels(labels: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Each token's target: the label of the token after it; the last token has none.

    Every row keeps its length, so that the head sees whole chunks and nothing is copied.
    """
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)

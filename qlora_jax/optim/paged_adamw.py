"""AdamW of 32 or 8 bits, its state paged to host memory or resident."""

import optax

from qlora_jax.optim.adamw import adamw
from qlora_jax.optim.adamw8bit import adamw8bit
from qlora_jax.optim.paged import Paged
from qlora_jax.optim.pages import PAGE_BYTES

ADAMW = {8: adamw8bit, 32: adamw}  # by the bits of a moment


def paged_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
    bits: int = 32,
    memory: str = "device",
    resident: int = 0,
    page_bytes: int = PAGE_BYTES,
) -> Paged:
    """`adamw` or, with `bits=8`, `adamw8bit`; paged to host memory or resident."""
    tx = ADAMW[bits](
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        loraplus_lr_ratio=loraplus_lr_ratio,
    )
    return Paged(
        tx,
        memory=memory,
        resident=resident,
        elementwise=True,
        contracts=False,
        page_bytes=page_bytes,
    )

"""What a layer keeps for the backward pass, by name; what it does not keep is computed again.

none            all that its gradient asks for
save-attention  its input, and what attention's gradient asks for
full            its input
offload         its input, in pinned host memory
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("none", "save-attention", "full", "offload")

ATTENTION = "attention"
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # jax's own operation, which bears no name


def again(function: Callable, remat: str) -> Callable:
    """`function`, of which the backward pass computes again what `remat` does not keep."""
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=is_attention if remat == "save-attention" else None)


def kept_by_name(tree: Any) -> Any:
    """Marks what `save-attention` keeps."""
    return checkpoint_name(tree, ATTENTION)


def is_attention(primitive: Any, *_: Any, **options: Any) -> bool:
    """jax.checkpoint's question of each operation: is its result kept."""
    return options.get("name") == ATTENTION or primitive.name == CUDNN_ATTENTION

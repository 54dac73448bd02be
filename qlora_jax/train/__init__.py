"""One training step in pieces: loss, gradients, loss scale, configuration and metrics; no loop."""

from qlora_jax.train.loss import loss_fn as loss_fn
from qlora_jax.train.step import accumulate as accumulate
from qlora_jax.train.step import finish as finish
from qlora_jax.train.step import gradients as gradients

"""Checkpoints in and out: Hugging Face folders, GGUF, PEFT adapters, a run's own state."""

from qlora_jax.checkpoints.load import load_weights as load_weights
from qlora_jax.checkpoints.merged import save_merged as save_merged
from qlora_jax.checkpoints.quantized import save_quantized as save_quantized
from qlora_jax.checkpoints.shards import Shards as Shards

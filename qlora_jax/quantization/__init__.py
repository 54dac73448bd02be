"""Stub."""
from qlora_jax.quantization.tensor import *
from qlora_jax.quantization.policy import *

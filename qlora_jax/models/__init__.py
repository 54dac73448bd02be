"""The decoder and its parts, for every family that families.py lists."""

from qlora_jax.models.cache import KVCache as KVCache
from qlora_jax.models.config import ModelConfig as ModelConfig
from qlora_jax.models.decoder import Decoder as Decoder

"""Text from a model: sampling rules, a cached decoding loop, and whole or streamed generation."""

from qlora_jax.inference.generate import generate as generate
from qlora_jax.inference.generate import stream_text as stream_text
from qlora_jax.inference.sampling import Sampling as Sampling

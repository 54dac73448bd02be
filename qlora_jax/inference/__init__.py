"""Text from a model: sampling rules, a cached decoding loop, and whole or streamed generation."""

from qlora_jax.inference.generate import generate as generate
from qlora_jax.inference.generate import stream_batch as stream_batch
from qlora_jax.inference.generate import stream_text as stream_text
from qlora_jax.inference.sampling import Sampling as Sampling
from qlora_jax.inference.weights import for_decoding as for_decoding

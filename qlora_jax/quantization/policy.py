"""Which weights are quantized, with which code, block and double quantization."""

import dataclasses

from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.quantize.api import BLOCK_SIZES
from qlora_jax.errors import InputError, nearest
from qlora_jax.weight_names import HEAD, LAYERS


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a model is quantized; the defaults are those of the QLoRA paper.

    Every linear inside the decoder layers becomes 4-bit. Embeddings, norms and biases stay dense,
    and so does the head unless it is asked for.

    Attributes:
      kind: nf4, fp4 or int4.
      block_size: weights that share a scale, a power of two from 32 to 4096.
      double_quant: scales in 8 bits.
      quantize_lm_head: an untied head too; a tied one is the embedding and stays dense.

    Raises:
      InputError: CFG-QUANT, an unknown kind or block size.
    """

    kind: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    quantize_lm_head: bool = False

    def __post_init__(self):
        if self.kind not in CODEBOOKS:
            close = nearest(str(self.kind), CODEBOOKS)
            found, expected = f"unknown kind {self.kind!r}", f"one of {', '.join(CODEBOOKS)}"
            hint = f"quant_type={close[0]}" if close else ""
            raise InputError("CFG-QUANT", "quant_type", found, expected, hint)
        if self.block_size not in BLOCK_SIZES:
            expected = f"one of {', '.join(map(str, BLOCK_SIZES))}"
            raise InputError("CFG-QUANT", "block_size", f"is {self.block_size!r}", expected)

    def covers(self, name: str) -> bool:
        """Whether the weight of this name becomes 4-bit.

        Args:
          name: stacked, or with its layer's index: `model.layers.self_attn.q_proj.weight`,
            `model.layers.3.self_attn.q_proj.weight`.
        """
        if name == HEAD:
            return self.quantize_lm_head
        return name.startswith(LAYERS) and name.endswith(".weight") and "norm" not in name

"""4-bit weights: what they are, which weights become so, and what is lost."""

from qlora_jax.quantization.policy import QuantizationConfig as QuantizationConfig
from qlora_jax.quantization.report import Report as Report
from qlora_jax.quantization.report import WeightError as WeightError
from qlora_jax.quantization.report import measure as measure
from qlora_jax.quantization.tensor import QuantizedTensor as QuantizedTensor
from qlora_jax.quantization.tensor import quantize as quantize
from qlora_jax.quantization.tensor import stack as stack

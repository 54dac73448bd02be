"""A frozen 4-bit product and its LoRA adapter in one call: x W^T + s (x A^T) B^T."""

from pallas_kernels.lora_matmul.api import lora_matmul as lora_matmul
from pallas_kernels.lora_matmul.delta import lora_delta as lora_delta

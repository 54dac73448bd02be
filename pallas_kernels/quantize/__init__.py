"""Floats to 4-bit codes and block scales, bit for bit bitsandbytes."""

from pallas_kernels.quantize.api import BLOCK_SIZES as BLOCK_SIZES
from pallas_kernels.quantize.api import DoubleQuantized as DoubleQuantized
from pallas_kernels.quantize.api import double_quantize as double_quantize
from pallas_kernels.quantize.api import quantize_4bit as quantize_4bit

"""4-bit codes and block scales back to floats, bit for bit bitsandbytes."""

from pallas_kernels.dequantize.api import dequantize_4bit as dequantize_4bit
from pallas_kernels.dequantize.api import expand_scales as expand_scales

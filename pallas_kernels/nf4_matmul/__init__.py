"""x W^T for a frozen 4-bit W, read as it is stored."""

from pallas_kernels.nf4_matmul.api import nf4_matmul as nf4_matmul
from pallas_kernels.nf4_matmul.api import preferred_layout as preferred_layout
from pallas_kernels.nf4_matmul.layout import prepack as prepack
from pallas_kernels.nf4_matmul.layout import unpack as unpack

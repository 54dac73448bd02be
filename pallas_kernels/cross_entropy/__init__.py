"""Cross entropy over a large vocabulary without the logits of all tokens in memory."""

from pallas_kernels.cross_entropy.api import CrossEntropy as CrossEntropy
from pallas_kernels.cross_entropy.api import cross_entropy as cross_entropy

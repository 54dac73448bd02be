"""Shapes that matter, by model: (tokens, vocabulary, width) of the head and its loss."""

from pallas_kernels.nf4_matmul.cases import TRAINING, Case, cases

CASES = (
    *cases("Llama-3.1-8B", {"lm_head": (128256, 4096)}, TRAINING),
    *cases("SmolLM2-135M", {"lm_head": (49152, 576)}, TRAINING),
)
TINY = (Case("tiny", "lm_head", 100, 1000, 64),)  # more than one chunk of tokens, the last ragged

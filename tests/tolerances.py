"""Every tolerance of the tests, each with its reason. Nothing here is loosened to make a test pass.

Names say what is compared and whether the bound is absolute (ATOL) or relative (RTOL).
"""

# golden models: float32 on both sides; sums in another order over 2 layers of width 64 differ by
# less than 1e-5, the rest is room for other CPUs. The peers' README states 2e-4.
LOGITS_ATOL = 2e-4
# golden models: a mean over 40 targets of a value near 6.
LOSS_ATOL = 2e-4

# Our own VJPs against autodiff of the same formula in float32: the same sums in another order.
VJP_RTOL = 2e-5
VJP_ATOL = 2e-5

# golden training: 12 steps of two implementations in float32; the golden data's README states both.
TRAINING_LOSS_RTOL = 1e-4
FINAL_ADAPTER_ATOL = 1e-4

# golden optimizers, of 32 and of 8 bits: the roundings are the peers', but that of lr / (1 - b1^t).
# Seen: 2.4e-7, one unit in the last place of a parameter of size 4; this is four.
OPTIMIZER_ATOL = 1e-6
# Schedules: float32 here, float64 in transformers; a few roundings of a factor up to 1.
SCHEDULE_ATOL = 3e-7

# 20,000 draws: the standard deviation of a share is at most 0.0036; this is over four of them.
SAMPLED_SHARE_ATOL = 0.015
# A mean of float32 losses near 6 against float64 log-softmax of the same float32 logits.
MEAN_NLL_RTOL = 1e-5

# adapters.merge: float32 against float64, sums of at most 16 products of size up to 30.
MERGE_RTOL = 1e-5
MERGE_ATOL = 1e-5

# golden smollm2: what its README states for the mean; 30 times that for its exponential, near 30.
SMOLLM2_NLL_ATOL = 2e-3
SMOLLM2_PERPLEXITY_ATOL = 6e-2
# Float32 logits near 20 after 30 layers, sums in another order.
SMOLLM2_LOGITS_ATOL = 2e-3

# A weight against its dequantized value: three float32 roundings (6e-8 each) of numbers up to
# absmax, against half of the widest gap of a codebook, which is at least absmax / 14.
HALF_GAP_RTOL = 5e-6

# quantization.report: float32 errors and row sums of at most 256 terms against float64.
REPORT_RTOL = 1e-5
# quantization.tensor: three layers under scan against one by one, float32, XLA's choice of order.
SCAN_RTOL = 1e-5

# Scales in 8 bits: the quotient is rounded to a grid of 65,536 steps over [-1, 1] first ...
DYNAMIC_GRID_ATOL = 1.6e-5
# ... and the offset, a mean near 1, is taken off and put back in float32.
OFFSET_ATOL = 5e-7

# GPU kernels against the float32 oracle, norm over norm: the table, the scale, their product and
# the result are rounded, to 8 bits (bfloat16: 2^-9 at most, 1.6e-3 in the mean square) or to 11.
# Seen: 3.1e-3 and 3.9e-4.
INTERPRETED_RTOL = {"bfloat16": 4e-3, "float16": 5e-4}
# The same with all roundings but the result's in the oracle. Seen: 1.7e-3 and 2.1e-4.
ROUNDED_RTOL = {"bfloat16": 3e-3, "float16": 4e-4}

# test_layout: float32 sums of 64 products near 1 in another order; another pair is wrong by 0.1.
REORDERED_SUM_ATOL = 1e-4

# models.rope: cosines of float32 angles of up to 200 radians, each half a unit (8e-6) off.
ROTATION_ATOL = 2e-5

# adapters.dora: float32 lengths of rows, or their squares, against NumPy's of the same numbers ...
ROW_LENGTH_RTOL = 1e-6
# ... and from three sums, in which W + s B A itself is never made.
ROW_LENGTH_BY_SUMS_RTOL = 2e-6
# A new adapter adds zeros, but the sums of float32 logits may come in another order.
NEW_ADAPTER_ATOL = 1e-5
# Modules trained in full: a float32 loss, and gradients summed over 22 positions, in two orders.
SAVED_LOSS_RTOL = 1e-6
SAVED_GRADIENT_RTOL = 1e-4
SAVED_GRADIENT_ATOL = 1e-5

# adapters.compose against float64: float32 products and sums of at most 4 terms of size up to 10.
COMPOSED_RTOL = 2e-5
COMPOSED_ATOL = 2e-5
# What peers' README states for add_weighted_adapter: 2e-4, as logits; svd 1e-3.
PEFT_SVD_ATOL = 1e-3
# One adapter with weight 1, its largest delta again: sqrt(s) A times sqrt(s) B against s (B A), two
# roundings each; svd's factors are rounded to float32 once. The bars are 1e-6 and 1e-3.
SAME_DELTA_ATOL = {"linear": 1e-6, "svd": 1e-5}

# fit_weights: float32 losses near 6, of an adapter whose A is scaled inside or outside the program.
FITTED_LOSS_ATOL = 2e-5
# ... weights found again from 744 tokens that were drawn with them: twice the larger of two misses.
FITTED_WEIGHT_ATOL = 0.1
# ... and the gradient of a weight against a difference over 0.1: the third derivative is left over.
SLOPE_RTOL = 2e-2

# Merged weights of the largest logit: they are rounded to float32 once more.
MERGED_LOGITS_RELATIVE = 1e-3

# GGUF: Gemma's norms near 1 get 1 added and taken away in float32, half a unit (6e-8) each time.
GGUF_NORM_ATOL = 1e-7
# Float32 logits of the same weights; Llama 3's RoPE becomes factors in float32.
GGUF_LOGITS_ATOL = 1e-5
# s B A against float64: alpha, s and a B that is multiplied for another alpha are float32.
GGUF_DELTA_RTOL = 1e-6
GGUF_DELTA_ATOL = 1e-7

# cross_entropy by blocks: dx, norm over norm, against float32 of the same numbers. Exponentials
# and the result are rounded to 8 bits (2^-9 at most, 1.6e-3 in the mean square) or to 11.
BLOCKS_GRADIENT_RTOL = {"bfloat16": 3e-3, "float16": 4e-4}

# Temporaries of a step on a CPU, by the traced program against XLA's own figure: what XLA loses
# between arrays of different sizes is not simulated.
PLANNED_TEMPORARIES = 0.1

# golden init: float32 decompositions, ours of a Gram matrix in float64, of matrices of size near
# 0.1 whose singular values are a hundredth apart at the least.
INIT_DELTA_ATOL = 1e-5
INIT_LENGTH_RTOL = 1e-5
# low_rank against NumPy's decomposition in float64: float32 products and results of values near 4.
LOW_RANK_ATOL = 1e-5
# quantization.compensated: the same columns in float32 and by another formula in float64, where a
# weight halfway between two codes may take the other one, and all columns behind it follow.
COMPENSATED_LOSS_RTOL = 0.05
# U H U^T against the identity in float64, H of condition 1e4.
FACTOR_RTOL = 1e-9
# models.moments: sums of 512 products in float32, of inputs behind a norm of another order of sums.
MOMENTS_RTOL = 1e-3
# Rows with adapters of their own against each adapter alone: float32 logits near 5, the scale in B
# and not behind it, sums of batched products in another order. A wrong adapter is off by over 0.1.
ROW_ADAPTER_ATOL = 1e-4
# Logits with a cache against without one, float32, near 5: sums in another order.
CACHED_ATOL = 1e-4
# An 8-bit cache, the largest difference of a logit as a share of the logits' standard deviation: a
# number is off by 1/254 of its head's largest at most, in each of up to 7 layers of random weights.
# Seen: 0.06. With the scale of another head or token it is over 1.
INT8_CACHE_ATOL = 0.1
# A product of 16 terms near 1 whose result may be rounded to bfloat16: half a unit in 8 bits.
BFLOAT16_RTOL = 4e-3

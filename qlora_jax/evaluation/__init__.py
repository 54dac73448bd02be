"""How good a model is: perplexity on fixed windows or on a dataset."""

from qlora_jax.evaluation.perplexity import PerplexityResult as PerplexityResult
from qlora_jax.evaluation.perplexity import perplexity as perplexity
from qlora_jax.evaluation.perplexity import windows as windows

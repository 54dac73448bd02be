"""Optimizers with their state in host or device memory, and learning-rate schedules."""

from qlora_jax.optim.adamw import adamw as adamw
from qlora_jax.optim.adamw8bit import adamw8bit as adamw8bit
from qlora_jax.optim.memory import MemoryChoice as MemoryChoice
from qlora_jax.optim.memory import choose_memory as choose_memory
from qlora_jax.optim.paged import Paged as Paged
from qlora_jax.optim.paged_adamw import paged_adamw as paged_adamw
from qlora_jax.optim.schedules import schedule as schedule

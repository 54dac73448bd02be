"""LoRA adapters: a pytree beside the frozen base, with PEFT's names, rules and beginning."""

from qlora_jax.adapters.adapter import Adapter as Adapter
from qlora_jax.adapters.compose import compose as compose
from qlora_jax.adapters.init import init_adapter as init_adapter
from qlora_jax.adapters.init import init_lora as init_lora
from qlora_jax.adapters.merge import merge_weight as merge_weight
from qlora_jax.adapters.merge import merged_config as merged_config
from qlora_jax.adapters.merge import merged_weights as merged_weights
from qlora_jax.adapters.spec import LoraSpec as LoraSpec
from qlora_jax.adapters.spec import make_spec as make_spec
from qlora_jax.adapters.spec import module_path as module_path
from qlora_jax.adapters.stack import AdapterStack as AdapterStack
from qlora_jax.adapters.stack import stack_adapters as stack_adapters

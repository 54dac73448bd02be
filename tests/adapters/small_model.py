"""A model as adapters see one: shapes of linears, a number of layers, weights."""

import dataclasses

SHAPES = {
    "self_attn.q_proj": (16, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.o_proj": (8, 16),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}


@dataclasses.dataclass(frozen=True)
class SmallConfig:
    num_hidden_layers: int = 3


@dataclasses.dataclass(frozen=True)
class SmallModel:
    held: dict = dataclasses.field(default_factory=dict)
    shapes: dict = dataclasses.field(default_factory=lambda: SHAPES)
    config: SmallConfig = SmallConfig()
    dtype: str = "float32"

    def module_shapes(self):
        return self.shapes | dict.fromkeys(("lm_head", "embed_tokens"), (9, 8))

    def weights(self):
        return self.held

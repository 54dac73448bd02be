"""Stub."""
import dataclasses
@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    kind: str="nf4"; block_size: int=64; double_quant: bool=True; quantize_lm_head: bool=False
    def covers(self,name): return name.startswith("model.layers.") and "norm" not in name and name.endswith(".weight")

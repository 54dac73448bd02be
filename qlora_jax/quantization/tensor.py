"""Stub."""
import dataclasses, jax
from typing import Any
from pallas_kernels.quantize.api import quantize_4bit, double_quantize
from pallas_kernels.dequantize.api import dequantize_4bit
from pallas_kernels.nf4_matmul import layout as L
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    codes: Any; absmax: Any
    shape: tuple = dataclasses.field(metadata={"static":True}); dtype: str = dataclasses.field(metadata={"static":True})
    block_size: int = dataclasses.field(default=64,metadata={"static":True}); kind: str = dataclasses.field(default="nf4",metadata={"static":True}); layout: str = dataclasses.field(default="bnb",metadata={"static":True})
    @property
    def lead(self): return self.codes.shape[:-2] if self.shape[1]%self.block_size==0 else self.codes.shape[:-1]
    def unpack(self): return dataclasses.replace(self,codes=L.unpack(self.codes,self.layout),layout="bnb")
    def prepack(self,layout): return dataclasses.replace(self,codes=L.prepack(self.unpack().codes,layout),layout=layout)
    def dequantize(self,dtype=None):
        t=self.unpack(); return dequantize_4bit(t.codes,t.absmax,shape=self.shape,kind=self.kind,block_size=self.block_size,dtype=dtype or self.dtype)
    def __getitem__(self,i): return jax.tree.map(lambda a:a[i],self)
    @property
    def nbytes(self): return sum(a.nbytes for a in jax.tree.leaves(self))
def quantize(w,*,kind="nf4",block_size=64,double_quant=True):
    c,a=quantize_4bit(w,kind=kind,block_size=block_size)
    return QuantizedTensor(c,double_quantize(a) if double_quant else a,w.shape,str(w.dtype),block_size,kind)

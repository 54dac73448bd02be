"""What a run says before its first step: what is trained, on what, with which choices and why.

model      SmolLM2-135M.gguf: llama, 30 layers, 134.5M parameters, 0.11 GB, 6.7 bits each
adapter    9.8M parameters (7.26% of the base), r 16, scale alpha/r = 2
...
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

import pallas_kernels
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.data.dataset import Dataset
from qlora_jax.models import Decoder
from qlora_jax.models.attention import explain as explain_attention
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.models.linear import stored_as
from qlora_jax.placement import fetched
from qlora_jax.quantization.tensor import QuantizedTensor

if TYPE_CHECKING:
    from qlora_jax.workflows.trainer import Trainer


def header(trainer: "Trainer") -> list[str]:
    """A line a topic, `topic      what and why`."""
    return [f"{topic:<10} {text}" for topic, text in rows(trainer)]


def rows(trainer: "Trainer") -> Iterator[tuple[str, str]]:
    """(topic, text) of each line."""
    model, lora, config = trainer.model, trainer.lora, trainer.config
    for note in trainer.notes:
        yield "note", note
    yield "model", f"{config.model or 'given'}: {described(model)}"
    yield "adapter", adapted(model, lora)
    if trainer.below.adapter is not None:
        yield "on top of", ", ".join(one["path"] for one in trainer.below.origin) or "given"
    yield "targets", ", ".join(lora.spec.targets)
    if saved := lora.spec.modules_to_save:
        yield "in full", ", ".join(saved)
    yield from data_rows(trainer)
    yield "step", step(trainer)
    yield "devices", devices()
    yield "optimizer", trainer.memory_reason
    yield "remat", f"{trainer.remat} ({trainer.plan.reasons['gradient_checkpointing']})"
    yield "weights", weights(trainer)
    yield "memory", memory(trainer)
    yield "dtype", f"{model.dtype} activations, float32 adapter and optimizer"
    yield "backend", backend(model, config.batch_size * trainer.row_length)
    if trainer.row_length:
        yield "attention", attention(trainer)


def compiling() -> str:
    """What is waited for before the first row."""
    kept = jax.config.jax_compilation_cache_dir
    return f"{'compiling':<10} (once{f'; programs are kept in {kept}' if kept else ''})"


def described(model: Decoder | LayerwiseDecoder) -> str:
    """Family, layers, parameters, and bytes and bits per parameter as loaded."""
    count, nbytes = size(model)
    kinds = {w.kind for w in model.weights().values() if isinstance(w, QuantizedTensor)}
    kind = f", linears in {'/'.join(sorted(kinds))}" if kinds else ""
    return (
        f"{model.config.model_type}, {model.config.num_hidden_layers} layers, "
        f"{millions(count)} parameters{kind}, {nbytes / 1e9:.2f} GB, "
        f"{8 * nbytes / count:.2f} bits each"
    )


def size(model: Decoder | LayerwiseDecoder) -> tuple[int, int]:
    """(parameters, bytes) of a model as it is loaded."""
    count = nbytes = 0
    for weight in model.weights().values():
        nbytes += weight.nbytes
        if isinstance(weight, QuantizedTensor):
            count += int(np.prod((*weight.lead, *weight.shape)))
        else:
            count += weight.size
    return count, nbytes


def adapted(model: Decoder | LayerwiseDecoder, lora: Adapter) -> str:
    """Parameters, share of the base, ranks and the effective scale."""
    spec, count = lora.spec, lora.num_parameters
    ranks = sorted({rank for name in spec.targets for rank in spec.ranks(name) if rank})
    scales = sorted({float(s) for name in spec.targets for s in spec.scales(name) if s})
    rule = "alpha/sqrt(r)" if spec.use_rslora else "alpha/r"
    dora = ", DoRA" if spec.use_dora else ""
    dropout = f", dropout {spec.lora_dropout:g}" if spec.lora_dropout else ""
    return (
        f"{millions(count)} parameters ({100 * count / size(model)[0]:.2f}% of the base), "
        f"r {numbers(ranks)}, scale {rule} = {numbers(scales)}{dora}{dropout}"
    )


def data_rows(trainer: "Trainer") -> Iterator[tuple[str, str]]:
    """What is trained on, and what it is evaluated on."""
    data = trainer.batches.data
    if not isinstance(data, Dataset):
        yield "data", "batches of the caller's own"
    else:
        for line in data.statistics.lines():
            yield "data", line
    if trainer.eval_data is not None:
        found = trainer.eval_data.statistics
        yield "eval data", f"rows {found.rows:,}, tokens {found.tokens:,}"
    elif trainer.config.save_best:
        yield "eval data", "none: save_best is off"


def weights(trainer: "Trainer") -> str:
    """Where the base lives, and why."""
    choices, reasons = trainer.plan.choices, trainer.plan.reasons
    places = {
        "off": "on the device",
        "on": "layers in host memory, each fetched while the one before computes",
        "all": "layers, embeddings and head in host memory, fetched as they are needed",
        "disk": "layers read from their files at every pass",
    }
    return f"{places[choices.stream_weights]} ({reasons['stream_weights']})"


def memory(trainer: "Trainer") -> str:
    """The plan against what there is."""
    plan = trainer.plan
    device, host, there = (
        f"{size / 1e9:.2f}" for size in (plan.device_bytes, plan.host_bytes, plan.budget.device)
    )
    if plan.budget.card is None:
        whole = f"{(plan.device_bytes + plan.host_bytes) / 1e9:.2f}"
        return f"{whole} of {there} GB, the process and compiling included (estimated)"
    return f"{device} of {there} GB on the device, {host} GB of the host (estimated)"


def step(trainer: "Trainer") -> str:
    """Steps of the run, and tokens of a step."""
    config = trainer.config
    rows, length = config.batch_size * config.gradient_accumulation_steps, trainer.row_length
    shape = f"{rows:,} rows ({config.batch_size} x {config.gradient_accumulation_steps})"
    tokens = f" of at most {length:,} tokens: {rows * length:,} a step" if length else ""
    return f"{trainer.total_steps:,} steps of {shape}{tokens}"


def devices() -> str:
    """How many devices of which kind."""
    kinds = [device.device_kind for device in jax.local_devices()]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def backend(model: Decoder | LayerwiseDecoder, tokens: int) -> str:
    """Which kernel reads the 4-bit weights, and why not the others."""
    packed = [w for w in model.weights().values() if isinstance(w, QuantizedTensor)]
    if not packed:
        return f"{jax.default_backend()}: dense weights, XLA's own products"
    one = jax.eval_shape(lambda w: fetched(w[0] if w.lead else w), packed[0])
    x = jax.ShapeDtypeStruct((max(tokens, 1), one.shape[1]), model.dtype)
    choice = pallas_kernels.explain("nf4_matmul", x, one.codes, one.absmax, **stored_as(one))
    return f"{jax.default_backend()}, nf4_matmul by {choice.forward}"


def attention(trainer: "Trainer") -> str:
    """How attention is computed on the longest rows, and why not otherwise."""
    model, rows = trainer.model, trainer.config.batch_size
    packed = trainer.batches.packed
    return str(explain_attention(model.config, rows, trainer.row_length, model.dtype, packed))


def numbers(values: list[float]) -> str:
    """One number, or the smallest and the largest of several."""
    few = [values[0], values[-1]] if len(values) > 1 else values
    return " to ".join(f"{value:g}" for value in few)


def millions(count: int) -> str:
    """134.5M, 8.03B, 12,288."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"

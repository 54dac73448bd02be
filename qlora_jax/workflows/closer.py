"""Writes or makes adapters that begin closer to the dense model: PiSSA and LoftQ.

    quantize_closer   MODEL -> OUT, 4 bits chosen with an adapter, and OUT/adapter, its beginning
    loftq             an adapter for 4 bits that stay as they are, from the dense weights

Dense weights are read one at a time and dropped, so that peak memory is about four of them in
float32 and, of the exact decomposition, two square matrices of their shorter side in float64.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.adapter import Adapter, Shapes, param_shapes
from qlora_jax.adapters.closer import Closer, begin_closer, refuse_rank
from qlora_jax.adapters.low_rank import low_rank
from qlora_jax.adapters.spec import LoraSpec, make_spec, module_path
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.atomic import refuse_existing
from qlora_jax.checkpoints.bnb4bit import is_4bit
from qlora_jax.checkpoints.load import Loader, Progress, Source, quantized_as
from qlora_jax.checkpoints.names import split
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.checkpoints.write_shards import SHARD_BYTES
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.families import module_shapes
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.report import Report, WeightError, measure
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.train.config import TrainConfig
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.adapter_folder import base_facts
from qlora_jax.workflows.convert import loader_of, refuse_4bit, report_files, write_4bit
from qlora_jax.workflows.from_disk import open_from_disk
from qlora_jax.workflows.hub import repository
from qlora_jax.workflows.open import open_source
from qlora_jax.workflows.run_folder import as_json

ADAPTER = "adapter"  # the folder beside the weights
DTYPE = "bfloat16"  # what training computes in unless it is told otherwise


def quantize_closer(
    path: str | Path,
    out: str | Path,
    how: Closer,
    quantization: QuantizationConfig | None = None,
    *,
    r: int = 64,
    alpha: int | float | None = None,
    targets: str | Sequence[str] = "all-linear",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int | float] | None = None,
    use_rslora: bool = False,
    dtype: str | None = None,
    report: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[Report, bool]:
    """Writes a 4-bit model and, in its folder `adapter`, the LoRA that begins closer with it.

        quantize_closer("model", "out/loftq", Closer("loftq", 5), r=16)
        run = open_run(TrainConfig(model="out/loftq", adapter="out/loftq/adapter", ...)).fit()

    Both are what bitsandbytes and PEFT write themselves, and open there. Only together they are
    near the model: 4 bits of PiSSA are what it left over.

    Args:
      path, out, quantization, dtype, shard_bytes, progress: as for `quantize_checkpoint`.
      how: the method.
      r, targets, rank_pattern, alpha_pattern, use_rslora: as for `make_spec`.
      alpha: by default r, as in both papers: a scale of 1.
      report: quantization.json and quantization.png lie in `out`.

    Returns:
      What base and adapter together lose, beside it what 4 bits alone would lose, and whether a
      tokenizer was copied.

    Raises:
      InputError: as `quantize_checkpoint`; LORA-..., INIT-RANK.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    refuse_existing(out)
    with open_source(path) as source:
        refuse_4bit(source)
        shape = ModelConfig.from_dict(source.config, str(source.path))
        shapes = module_shapes(shape)
        spec = make_spec(
            shapes,
            shape.num_hidden_layers,
            r=r,
            alpha=r if alpha is None else alpha,
            targets=targets,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            use_rslora=use_rslora,
        )
        refuse_ranks(spec, shapes)
        begun = Beginning(spec, shapes, how, quantization or QuantizationConfig())
        loader = loader_of(source, begun.quantization, dtype, progress=progress, quantizer=begun)
        files = report_files(begun.report) if report else {}
        files[peft.EXTRA] = lambda: as_json({"init": begun.facts(str(path))})
        copied = write_4bit(
            loader, out, shard_bytes, files, lambda folder: begun.save(folder, str(path), str(out))
        )
    return begun.report(), copied


class Beginning:
    """The quantizer of a `Loader` that keeps A and B of each weight that it has made 4-bit.

    Args:
      spec: what is adapted.
      shapes: of the model's modules.
      how: the method.
      quantization: the 4 bits.
    """

    def __init__(
        self, spec: LoraSpec, shapes: Shapes, how: Closer, quantization: QuantizationConfig
    ):
        self.spec, self.how, self.quantization = spec, how, quantization
        self.params = zeros(spec, shapes)
        self.errors: list[WeightError] = []
        self.alone: list[WeightError] = []

    def __call__(self, name: str, dense: np.ndarray) -> QuantizedTensor:
        quantize = functools.partial(quantized_as, self.quantization)
        target, layer, rank, scale = place_of(name, self.spec)
        if not rank:
            tensor = quantize(dense)
            error = plain = measure(name, dense, tensor)
        else:
            begun = begin_closer(
                dense, rank, scale, self.how, quantize, where=name, number=number_of(name)
            )
            put(self.params[target], layer, begun.A, begun.B)
            tensor = begun.base
            plain = measure(name, dense, tensor if self.how.keeps_base else quantize(dense))
            rest = dense.astype(np.float32) - np.float32(scale) * (begun.B @ begun.A)
            error = measure(name, rest, tensor)
            error = dataclasses.replace(error, squared_weight=plain.squared_weight)
        self.errors.append(error)
        self.alone.append(plain)
        return tensor

    def report(self) -> Report:
        """What was lost so far."""
        return Report(tuple(self.errors), tuple(self.alone))

    def facts(self, source: str) -> dict[str, Any]:
        """What qlora_jax.json says about how it was made."""
        return {
            **dataclasses.asdict(self.how),
            "source": repository(source),
            "adapter": ADAPTER,
            "relative_error": self.report().total.relative_error,
            "relative_error_alone": self.report().plain.relative_error,
        }

    def save(self, folder: Path, source: str, out: str) -> None:
        """Writes the adapter into the folder of its base, whose weights are there by now."""
        with Shards(folder) as written:
            facts = base_facts(open_from_disk(written, None, DTYPE))
        peft.save_adapter(
            folder / ADAPTER,
            Adapter(jax.tree.map(jnp.asarray, self.params), self.spec),
            base_model_name=repository(out),
            extra={**facts, "init": self.facts(source)},
        )


def loftq(
    lora: Adapter,
    model: Decoder | LayerwiseDecoder,
    path: str | Path,
    *,
    niter: int | None = None,
    seed: int = 0,
) -> Adapter:
    """An adapter as `lora`, with A and B that make up for what 4 bits lost of the dense weights.

        lora = ql.loftq(ql.init_lora(model, r=16, alpha=16, key=key), model, "path/to/dense")

        s B A = SVD_r(W - Q)        Q the model's 4 bits, which stay as they are; W the dense weight

    Args:
      lora: gives targets, ranks and scales; modules_to_save stay as they are.
      model: the 4-bit base.
      path: the model that was quantized: a dense Hugging Face folder, a .gguf, or an id of the Hub.
      niter, seed: power iterations of a randomized decomposition; None is exact.

    Raises:
      InputError: INIT-SOURCE, `path` is 4-bit or another model; INIT-DENSE, `model` is dense;
        INIT-DORA; INIT-RANK.

    Source: `peft.replace_lora_weights_loftq`, which is right for a scale of 1; the scale is divided
    out here.
    """
    spec, weights = lora.spec, model.weights()
    with open_source(path) as source:
        refuse_no_loftq(source, spec, model.module_shapes(), model.config.num_hidden_layers)
        config = ModelConfig.from_dict(source.config, str(source.path))
        loader = Loader(source, config, None, "float32")
        params = zeros(spec, model.module_shapes())
        for target in spec.targets:
            stacked = f"{LAYERS}{target}.weight"
            if not isinstance(weights[stacked], QuantizedTensor):
                found, expected = "is dense: nothing was lost", "a model in 4 bits"
                raise InputError("INIT-DENSE", stacked, found, expected, "the default beginning")
            for name in loader.table[stacked]:
                _, layer, rank, scale = place_of(name, spec)
                if rank:
                    own = jax.tree.map(
                        np.asarray, weights[stacked][layer]
                    )  # from wherever it lives
                    lost = loader.read(name) - np.asarray(own.dequantize("float32"))
                    halves = low_rank(lost, rank, scale, niter=niter, seed=(seed, number_of(name)))
                    put(params[target], layer, *halves)
    new = {name: jax.tree.map(jnp.asarray, own) for name, own in params.items()}
    return Adapter({**lora.params, **new}, spec)


def refuse_beginning(config: TrainConfig, source: Source, spec: LoraSpec) -> None:
    """What a new adapter cannot begin with on this base, from headers.

    Raises:
      InputError: INIT-RESIDUAL, the base is what PiSSA left over; as `refuse_no_loftq`.
    """
    if is_residual(source):
        found = "is what PiSSA left of a model: without the adapter beside it, it is none"
        hint = f"adapter={source.path}/{ADAPTER}"
        raise InputError("INIT-RESIDUAL", source.path, found, "that adapter", hint)
    if config.init != "default":
        shape = ModelConfig.from_dict(source.config, str(source.path))
        refuse_no_loftq(source, spec, module_shapes(shape), shape.num_hidden_layers)


def is_residual(source: Source) -> bool:
    """Whether a model's folder says that it is what PiSSA left over."""
    init = peft.read_extra(source.path).get("init") if isinstance(source, Shards) else None
    return isinstance(init, dict) and str(init.get("name")).startswith("pissa")


def refuse_no_loftq(source: Source, spec: LoraSpec, shapes: Shapes, layers: int) -> None:
    """What `loftq` needs of a source, from headers.

    Raises:
      InputError: INIT-SOURCE, INIT-DORA, INIT-RANK.
    """
    if is_4bit(source.config, str(source.path)):
        raise InputError(
            "INIT-SOURCE",
            source.path,
            "is 4-bit: what it lost of its dense weights cannot be seen",
            "the dense model",
            f"init=default, or qlora-jax quantize DENSE OUT --init loftq, model=OUT and "
            f"adapter=OUT/{ADAPTER}",
        )
    config = ModelConfig.from_dict(source.config, str(source.path))
    if dict(module_shapes(config)) != dict(shapes) or config.num_hidden_layers != layers:
        found = "is another model than the one that is adapted: its shapes differ"
        raise InputError("INIT-SOURCE", source.path, found, "the model that was quantized")
    if spec.use_dora:
        found, hint = "loftq with DoRA, whose lengths of rows are the base's", "use_dora=false"
        raise InputError("INIT-DORA", "init", found, "LoRA or rsLoRA", hint)
    refuse_ranks(spec, shapes)


def refuse_ranks(spec: LoraSpec, shapes: Shapes) -> None:
    """Ranks that the matrices do not have, known before one is read.

    Raises:
      InputError: INIT-RANK.
    """
    for target in spec.targets:
        for layer, rank in enumerate(spec.ranks(target)):
            refuse_rank(rank, shapes[target], module_path(layer, target))


def place_of(name: str, spec: LoraSpec) -> tuple[str, int, int, float]:
    """(target, layer, rank, scale) of a weight; rank 0 where it has no adapter."""
    stacked, layer = split(name)
    target = stacked.removeprefix(LAYERS).removesuffix(".weight")
    if layer is None or target not in spec.targets:
        return target, -1, 0, 0.0
    return target, layer, spec.ranks(target)[layer], float(spec.scales(target)[layer])


def zeros(spec: LoraSpec, shapes: Shapes) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of the targets, in host memory."""
    wanted = param_shapes(spec, shapes)
    return {
        target: {kind: np.zeros(shape, np.float32) for kind, shape in wanted[target].items()}
        for target in spec.targets
    }


def put(own: dict[str, np.ndarray], layer: int, A: np.ndarray, B: np.ndarray) -> None:
    """A and B of one layer in their place among all layers; the padding stays zero."""
    own["A"][layer, : len(A)] = A
    own["B"][layer, :, : len(A)] = B


def number_of(name: str) -> int:
    """Another number for each weight, the same on every machine."""
    return zlib.crc32(name.encode())

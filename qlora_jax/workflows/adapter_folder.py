"""An adapter's folder and the base that it was trained on: written together, compared when opened.

qlora_jax.json says which base, how it was quantized, which template and which stop tokens: PEFT
refuses fields of ours in adapter_config.json.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.checkpoints import manifest, peft
from qlora_jax.checkpoints.bnb4bit import DENSE_DTYPES
from qlora_jax.checkpoints.orbax_io import load_orbax
from qlora_jax.data.chat import stop_tokens
from qlora_jax.errors import ConfigMismatch, InputError, listed
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.families import module_shapes
from qlora_jax.models.fingerprint import fingerprint
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ON_TOP_OF = "on_top_of"  # in qlora_jax.json: the adapters below, see workflows/below.py


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    model: Decoder | LayerwiseDecoder,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    base_model_name: str | None = None,
    extra: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Writes an adapter as PEFT lays it out, then reads it again and compares.

        save_adapter("out/adapter", run.lora, model, tok)

    Args:
      path: a new folder, or with `replace` one that may hold an adapter.
      adapter: what is written.
      model: the base that it was trained on; described in qlora_jax.json.
      tokenizer: saved beside it, with its chat template.
      base_model_name: PEFT's base_model_name_or_path.
      extra: further fields of qlora_jax.json.
      replace: files of an existing folder may be replaced.

    Raises:
      InputError: OUT-EXISTS, or LORA-FINITE for an adapter with NaN or infinity.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    peft.save_adapter(
        path,
        adapter,
        base_model_name=base_model_name,
        tokenizer=tokenizer,
        extra={**base_facts(model), **tokenizer_facts(tokenizer), **(extra or {})},
        replace=replace,
    )


def load_adapter(
    path: str | Path,
    model: Decoder | LayerwiseDecoder,
    *,
    any_base: bool = False,
    beside: Sequence[str | Path] = (),
) -> Adapter:
    """The adapter in a PEFT folder, refused when it says that it was trained on another base.

    An adapter that was trained on top of others has these in its base: without them it is half of
    what was trained, and refused too.

    Args:
      path: the folder: a run's, a checkpoint's, or any that PEFT wrote.
      model: the base.
      any_base: do not compare.
      beside: folders of adapters that are used together with this one.

    Raises:
      InputError: a file is missing or damaged, or does not fit the model; PEFT-BELOW, an adapter
        that this one was trained on top of is not `beside` it.
      ConfigMismatch: PEFT-BASE, with both fingerprints.
    """
    adapter = peft.load_adapter(path, model)
    saved, own = peft.read_extra(path), base_facts(model)
    alike = all(saved.get(key) == own[key] for key in ("dtype", "quantization"))
    base = str(saved.get("base", own["base"]))
    # Loaded in another dtype, the same model has another fingerprint: nothing to compare.
    if alike and base != own["base"] and not any_base:
        raise ConfigMismatch(
            "PEFT-BASE",
            path,
            f"was trained on another base: fingerprint {base[:12]}, this model has "
            f"{own['base'][:12]}",
            "the model that it was trained on",
            "that model, or --any-base",
        )
    if not any_base:
        refuse_without_below(path, saved.get(ON_TOP_OF, []), beside)
    return adapter


def refuse_without_below(path: str | Path, below: Any, beside: Sequence[str | Path]) -> None:
    """Refuses an adapter where one that it was trained on top of is not there.

    Raises:
      InputError: PEFT-BELOW; PEFT-EXTRA, qlora_jax.json is damaged.
    """
    if not below:
        return
    try:
        wanted = {(one["sha256"], one["config_sha256"]): str(one["path"]) for one in below}
    except (TypeError, KeyError, AttributeError):
        found, expected = f"{ON_TOP_OF} is {below!r:.80}", "path, sha256 and config_sha256 of each"
        raise InputError("PEFT-EXTRA", f"{path}/{peft.EXTRA}", found, expected) from None
    there = {tuple(digests(one).values()) for one in beside}
    if lost := [name for key, name in wanted.items() if key not in there]:
        raise InputError(
            "PEFT-BELOW",
            path,
            f"was trained on top of {listed(lost)}: alone it is half of what was trained",
            "both together",
            f"qlora-jax compose {' '.join(lost)} {path} -o BOTH --model BASE, and then BOTH",
        )


def digests(path: str | Path) -> dict[str, str]:
    """SHA-256 of an adapter's tensors, and of its configuration, which holds the scales."""
    folder = Path(path)
    alone = folder / peft.OLD_TENSORS
    tensors = folder / peft.TENSORS if (folder / peft.TENSORS).exists() else alone
    return {
        "sha256": manifest.file_digest(tensors)["sha256"],
        "config_sha256": manifest.file_digest(folder / peft.CONFIG)["sha256"],
    }


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a PEFT folder, or in one of Orbax, for a model that is known by its config.

    Raises:
      InputError: what `peft.read_adapter` and `load_orbax` refuse; PEFT-BELOW as of `load_adapter`;
        EXPORT-ORBAX, EXPORT-BASE: Orbax holds something else, or an adapter of another model.
      StorageError: what Orbax holds is damaged.
    """
    path, shapes, layers = Path(path), module_shapes(config), config.num_hidden_layers
    if (path / peft.CONFIG).exists() or not (path / manifest.NAME).exists():
        refuse_without_below(path, peft.read_extra(path).get(ON_TOP_OF), ())
        return peft.read_adapter(path, shapes, layers)
    adapter = load_orbax(path)
    if not isinstance(adapter, Adapter):
        found = "is an Orbax checkpoint of something else"
        raise InputError("EXPORT-ORBAX", path, found, "an adapter")
    other = [name for name, shape in adapter.shapes.items() if shapes.get(name) != tuple(shape)]
    if other or adapter.spec.num_layers != layers:
        found = f"does not fit the model: {listed(other) or f'{adapter.spec.num_layers} layers'}"
        raise InputError("EXPORT-BASE", path, found, "the base that it was trained on")
    return adapter


def base_facts(model: Decoder | LayerwiseDecoder) -> dict[str, Any]:
    """What qlora_jax.json says about the base."""
    packed = [w for w in model.weights().values() if isinstance(w, QuantizedTensor)]
    facts: dict[str, Any] = {"base": fingerprint(model), "dtype": model.dtype}
    if not packed:
        return {**facts, "quantization": None}
    one = packed[0]
    return {
        **facts,
        "quantization": {
            "kind": one.kind,
            "block_size": one.block_size,
            "double_quant": not hasattr(one.absmax, "dtype"),  # a tuple of arrays, or an array
        },
    }


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    """What qlora_jax.json says about the template and what ends a turn."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return {}
    facts: dict[str, Any] = {"chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()}
    try:
        ids = stop_tokens(tokenizer)
    except InputError:  # a template that the two probing messages do not suit
        return facts
    return {**facts, "stop_tokens": tokenizer.convert_ids_to_tokens(ids)}


def trained_with(path: str | Path) -> tuple[QuantizationConfig | None, str] | None:
    """(quantization, dtype) of the base as the adapter was trained on it; None if it does not say.

    Raises:
      InputError: qlora_jax.json is damaged.
    """
    saved = peft.read_extra(path)
    if "quantization" not in saved or "dtype" not in saved:
        return None
    fields, dtype, where = saved["quantization"], saved["dtype"], f"{path}/{peft.EXTRA}"
    if dtype not in DENSE_DTYPES:
        found = f"dtype is {dtype!r:.80}"
        raise InputError("PEFT-EXTRA", where, found, f"one of {listed(DENSE_DTYPES)}")
    try:
        return (None if fields is None else QuantizationConfig(**fields)), dtype
    except TypeError:
        found = f"quantization is {fields!r:.80}"
        raise InputError("PEFT-EXTRA", where, found, "kind, block_size, double_quant") from None

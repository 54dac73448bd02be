"""Adapters opened to be combined, and what the result's qlora_jax.json says of where it came from.

"composition": {"method": "svd", "svd_rank": 8, "adapters": [
    {"path": "out/a", "weight": 0.7, "sha256": of adapter_model.safetensors, "config_sha256": ...}]}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.method import Method
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import Progress
from qlora_jax.checkpoints.manifest import file_digest
from qlora_jax.checkpoints.peft import CONFIG, present, read_extra
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import ConfigMismatch, InputError
from qlora_jax.models import Decoder
from qlora_jax.workflows.adapter_folder import digests, load_adapter
from qlora_jax.workflows.companions import companions, has_tokenizer
from qlora_jax.workflows.fit_weights import FittedWeights
from qlora_jax.workflows.open import load_model, open_source
from qlora_jax.workflows.open_as_trained import Choice, choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COMPOSITION = "composition"  # the key in qlora_jax.json


def refuse_other_bases(paths: Sequence[str], any_base: bool = False) -> None:
    """Refuses adapters that say that they were trained on different bases; no weight is read.

    Bases that were quantized or computed in another way cannot be compared, and are not.

    Raises:
      InputError: PEFT-FOLDER for what is no adapter's folder; COMPOSE-BASE.
    """
    first: dict[str, tuple[str, str]] = {}
    for path in paths:
        present(Path(path), CONFIG)
        said = read_extra(path)
        if any_base or "base" not in said:
            continue
        how = repr((said.get("dtype"), said.get("quantization")))
        other, base = first.setdefault(how, (path, str(said["base"])))
        if str(said["base"]) != base:
            found = f"was trained on the base {str(said['base'])[:12]}, and {other} on {base[:12]}"
            hint = "adapters of one base, or --any-base"
            raise InputError("COMPOSE-BASE", path, found, "the same base", hint)


def open_base(
    path: str | Path,
    adapters: Sequence[str],
    *,
    tokenizer: bool,
    progress: Progress | None = None,
    **how: Any,
) -> "tuple[Decoder, PreTrainedTokenizerFast | None, Choice]":
    """(model, tokenizer, why so), as the first adapter was trained, with its tokenizer.

    Args:
      path: the base.
      adapters: folders; the first with a tokenizer gives it.
      tokenizer: one is needed, if need be the base's.
      progress: called after each tensor with (bytes done, bytes in all, name).
      **how: as for `choose`.
    """
    own = next((one for one in adapters if has_tokenizer(companions(one))), None)
    with open_source(path) as source:
        choice = choose(source, adapters[0], **how)
        model = load_model(
            source, quantization=choice.quantization, dtype=choice.dtype, progress=progress
        )
        if own is not None:
            return model, load_tokenizer(own, vocab_size=model.config.vocab_size), choice
        if not tokenizer:
            return model, None, choice
        metadata = source.metadata if isinstance(source, GGUF) else None
        found = load_tokenizer(source.path, metadata, vocab_size=model.config.vocab_size)
        return model, found, choice


def open_adapters(
    paths: Sequence[str], model: Decoder, *, any_base: bool = False
) -> dict[str, Adapter]:
    """The adapters by path, each refused where it says that it was trained on another base.

    Raises:
      InputError: as of `load_adapter`; also PEFT-BASE, since here nothing was begun.
    """
    try:
        return {path: load_adapter(path, model, any_base=any_base, beside=paths) for path in paths}
    except ConfigMismatch as error:
        parts = error.code, error.where, error.found, error.expected, error.hint
        raise InputError(*parts) from None


def provenance(
    weights: Mapping[str, float | Sequence[float]],
    method: Method,
    fitted: FittedWeights | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """What qlora_jax.json says: method, options, and of each adapter path, weight and digests.

    Args:
      weights: by the paths of the adapters.
      method: how they were combined.
      fitted: how the weights were found, if they were not given.
      data: the file that they were fitted on.
    """
    found: dict[str, Any] = {
        "method": method.name,
        **method.options,
        "adapters": [{"path": path, "weight": w, **digests(path)} for path, w in weights.items()],
    }
    if fitted is not None:
        found["fit"] = {
            "data": data,
            "sha256": file_digest(Path(data))["sha256"] if data and Path(data).is_file() else None,
            "fitted_on_tokens": fitted.fitted_on,
            "told_on_tokens": fitted.targets,
            "loss": dict(fitted.rows),
        }
    return {COMPOSITION: found}

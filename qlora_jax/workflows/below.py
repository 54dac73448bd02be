"""The adapters that a run trains on top of: opened, added up, and remembered in qlora_jax.json."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.composable import check_kinds
from qlora_jax.adapters.compose import compose
from qlora_jax.adapters.on_top import on_top
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.workflows.adapter_folder import ON_TOP_OF, digests, load_adapter


@dataclasses.dataclass(frozen=True)
class Below:
    """What lies between the base and the adapter that is trained.

    Attributes:
      adapter: the sum of the frozen adapters; None where there is none.
      origin: of each its path and digests.
    """

    adapter: Adapter | None = None
    origin: tuple[dict[str, str], ...] = ()

    def under(self, adapter: Adapter) -> Adapter:
        """Both as one adapter."""
        return adapter if self.adapter is None else on_top(self.adapter, adapter)

    @property
    def arguments(self) -> dict[str, Adapter]:
        """What a step's gradients take."""
        return {} if self.adapter is None else {"frozen": self.adapter}

    @property
    def facts(self) -> dict[str, Any]:
        """For qlora_jax.json of what is trained on top."""
        return {ON_TOP_OF: list(self.origin)} if self.origin else {}

    @property
    def digest(self) -> str:
        """Tells it from others, for a run that is resumed."""
        return "".join(f"+{one['sha256']}{one['config_sha256']}" for one in self.origin)


def open_below(paths: Sequence[str], model: Decoder | LayerwiseDecoder) -> Below:
    """The frozen adapters of a run, each with weight 1.

    Raises:
      InputError: as of `load_adapter` and `compose`.
      ConfigMismatch: PEFT-BASE.
    """
    if not paths:
        return Below()
    adapters = {path: load_adapter(path, model, beside=paths) for path in paths}
    check_kinds(adapters)
    origin = tuple({"path": path, **digests(path)} for path in paths)
    return Below(compose(adapters, dict.fromkeys(paths, 1.0)), origin)


def refuse_kinds(below: Below, adapter: Adapter, model: Decoder | LayerwiseDecoder) -> None:
    """What cannot be trained on top of another adapter.

    Raises:
      InputError: COMPOSE-KIND for DoRA and modules trained in full; RUN-BELOW.
    """
    if below.adapter is None:
        return
    check_kinds({"the adapter on top": adapter})
    if adapter.spec.lora_dropout:
        found = f"{adapter.spec.lora_dropout}, which would drop inputs of the frozen adapters too"
        raise InputError("RUN-BELOW", "lora_dropout", found, "0 with frozen_adapters")
    if isinstance(model, LayerwiseDecoder):
        found = "layers from disk are not computed with frozen_adapters"
        raise InputError("RUN-BELOW", "stream_weights", found, "on, all or off")

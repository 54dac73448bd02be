"""PEFT's adapter_config.json to a LoraSpec and back; what would change the mathematics is refused.

PEFT itself ignores keys that it does not know, and so computes another model than was trained.
"""

from collections.abc import Mapping

from qlora_jax.adapters.adapter import Shapes
from qlora_jax.adapters.spec import LoraSpec, make_spec
from qlora_jax.errors import InputError, nearest

# Read into the spec.
READ = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "use_dora": bool,
    "modules_to_save": list,
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "layers_to_transform": (list, int),
}
MEMBERS = {
    "modules_to_save": str,
    "target_modules": str,
    "exclude_modules": str,
    "rank_pattern": int,
    "alpha_pattern": (int, float),
    "layers_to_transform": int,
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")

# Accepted with these values only: another one means a model that is not computed here. The
# initialisations left out (pissa, olora, loftq, corda, lora_ga) change the base as well.
ONLY = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "layers_pattern": (None, [], "layers", ["layers"]),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "ensure_weight_tying": (False,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}

# How it was made or where from: never acted on, whatever they hold.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}

OFF = (None, False, "", [], {})  # an unknown key with one of these is switched off


def spec_from_config(config: Mapping, shapes: Shapes, num_layers: int, where: str) -> LoraSpec:
    """The LoraSpec that an adapter_config.json means for a model.

    Args:
      config: the file's content.
      shapes: of the model's modules.
      num_layers: of the model.
      where: the file, for errors.

    Raises:
      InputError: a key that is missing, unknown, of another type, out of range, or that asks for
        what is not computed here.
    """
    for key, value in config.items():
        check_key(key, value, f"{where}: {key}")
    for key in REQUIRED:
        if config.get(key) is None:
            raise InputError("PEFT-MISSING", where, f"{key} is missing", "PEFT's LoraConfig")
    given = {key: config[key] for key in READ if config.get(key) is not None}
    renamed = {
        "alpha": given.pop("lora_alpha"),
        "dropout": given.pop("lora_dropout", 0.0),
        "targets": given.pop("target_modules"),
        "exclude": given.pop("exclude_modules", ()),
    }
    return make_spec(shapes, num_layers, **given, **renamed, where=where)


def check_key(key: str, value: object, where: str) -> None:
    """Refuses one entry of adapter_config.json that cannot be taken as it is."""
    if key in READ:
        if value is not None and not same_kind(value, READ[key]):
            raise InputError("PEFT-VALUE", where, repr(value), kind_names(READ[key]))
        members = value.values() if isinstance(value, dict) else value
        inside = isinstance(value, dict | list)
        if inside and not all(same_kind(member, MEMBERS[key]) for member in members):
            kinds = kind_names(MEMBERS[key])
            raise InputError("PEFT-VALUE", where, repr(value), f"each one {kinds}")
    elif key in ONLY:
        if not any(same_value(value, allowed) for allowed in ONLY[key]):
            expected = " or ".join(repr(allowed) for allowed in ONLY[key])
            raise InputError("PEFT-UNSUPPORTED", where, f"{value!r} is not supported", expected)
    elif key not in IGNORED and not any(same_value(value, off) for off in OFF):
        near = nearest(key, [*READ, *ONLY])
        hint = f"did you mean {' or '.join(near)}" if near else ""
        found = f"unknown key with the value {value!r}"
        raise InputError("PEFT-UNKNOWN", where, found, "keys of PEFT's LoraConfig", hint)


def same_kind(value: object, kinds: type | tuple[type, ...]) -> bool:
    """isinstance, but true is no number."""
    return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))


def same_value(value: object, other: object) -> bool:
    """Equal and of one type: 0 is not false."""
    return type(value) is type(other) and value == other


def kind_names(kinds: type | tuple[type, ...]) -> str:
    """`list or str`, for errors."""
    return " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))


def config_from_spec(spec: LoraSpec, base_model_name: str | None) -> dict:
    """The adapter_config.json of `spec`: fields that PEFT has had since 0.9, and nothing else."""
    return {
        "alpha_pattern": {key: plain_number(value) for key, value in spec.alpha_pattern},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": plain_number(spec.lora_alpha),
        "lora_dropout": spec.lora_dropout,
        "modules_to_save": list(spec.modules_to_save) or None,
        "peft_type": "LORA",
        "r": spec.r,
        "rank_pattern": dict(spec.rank_pattern),
        "revision": None,
        "target_modules": list(spec.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }


def plain_number(value: float) -> int | float:
    """16 for 16.0, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value

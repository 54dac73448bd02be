"""Which options of a config.json are read, which are passed over, and which are refused.

An option that changes what a model computes is never passed over.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import InputError, Note, listed, nearest
from qlora_jax.models.families import Family

# What every family reads.
READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"),
}
# Often met, with a word of SUSPECT in their names; not about a forward pass without dropout.
HARMLESS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "cache_implementation", "initializer_range", "output_attentions"),
    *("output_hidden_states", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("max_sequence_length", "model_max_length", "is_llama_config", "neftune_noise_alpha"),
}
# Words of what a decoder computes: an unknown option with one of them is refused when it is on.
SUSPECT = re.compile(
    "attn|attention|rope|rotary|position|norm|scal|logit|softcap|window|expert|moe|router|bias|"
    "residual|embed|act|head|layer|clip|multiplier|mup|alibi|query|key_|value|mlp|ffn|gate|conv"
)
OFF = (None, False, 0, "", [], {})


def check_options(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Passes only what the decoder computes as the options say.

    An unknown option whose name says nothing about the mathematics is passed over with a Note.

    Raises:
      InputError: CFG-MODEL for an option that is on, or has a value, that is not built here.
    """
    given = {**family.defaults, **config}
    for key, allowed in family.required.items():
        value = given.get(key)
        if not any(type(value) is type(a) and value == a for a in allowed):
            found = f"{shown(value)} is not supported for {family.model_type}"
            expected = " or ".join(repr(a) for a in allowed)
            raise InputError("CFG-MODEL", f"{where}: {key}", found, expected)
    known = {*READ, *family.required, *family.options, *family.defaults}
    strange = [
        key for key, value in config.items() if key not in known | HARMLESS and value not in OFF
    ]
    for key in filter(SUSPECT.search, strange):
        found = f"unknown option with the value {shown(config[key])}"
        close = nearest(key, known)
        hint = f"{close[0]}, if that was meant" if close else "a model without it"
        expected = f"options of {family.model_type}"
        raise InputError("CFG-MODEL", f"{where}: {key}", found, expected, hint)
    if strange:
        warnings.warn(f"{where}: not known, not read: {listed(strange)}", Note, stacklevel=2)


def shown(value: Any) -> str:
    """A value in an error, however long it is."""
    return repr(str(value)[:80])

"""What is in an adapter's folder as PEFT lays it out, from headers: no tensor is read."""

import contextlib
from pathlib import Path

from qlora_jax.checkpoints.peft import CONFIG, open_tensors, present, read_extra
from qlora_jax.checkpoints.peft_tensors import PREFIX
from qlora_jax.checkpoints.strict_json import read_json
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.companions import TOKENIZER, companions
from qlora_jax.workflows.describe_model import one_weight
from qlora_jax.workflows.description import Description, grouped

FACTS = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "modules_to_save", "lora_dropout"),
    *("rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision"),
)


def describe_adapter(folder: Path) -> Description:
    """Ranks, what is adapted, and where it comes from; an empty pattern is not mentioned.

    Raises:
      InputError: a file is missing or damaged.
    """
    config = read_json(present(folder, CONFIG))
    with contextlib.closing(open_tensors(folder)) as file:
        entries = file.entries
    modules = {key.removeprefix(PREFIX): entry for key, entry in entries.items()}
    weights = grouped(one_weight(name, entry) for name, entry in modules.items())
    adapted = [weight.name.split(".lora_")[0] for weight in weights if ".lora_" in weight.name]
    return Description(
        str(folder),
        kind="adapter",
        facts={key: config[key] for key in FACTS if config.get(key) not in (None, {}, [])},
        weights=weights,
        targets=list(dict.fromkeys(name.removeprefix(LAYERS) for name in adapted)),
        files=[Path(file.where).name],
        tokenizer=[name for name in companions(folder) if name in TOKENIZER],
        made=read_extra(folder),
    )

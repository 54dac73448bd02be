"""A whole model of two layers: the golden Llama's weights, and a tokenizer of single bytes."""

import shutil
from pathlib import Path

from tests.golden_data import golden_folder

FEW_TARGETS = ["q_proj", "down_proj"]  # for adapters in tests: each target is compiled
SPECIAL = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2, as its config.json says
NEVER = {"À", "Á", "ÿ"}  # stand for bytes that UTF-8 does not use: 253 + 3 fill the 256 rows
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tiny_model(folder: Path) -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and a chat template; gives `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(golden_folder("models/llama"), folder)
    names = [*SPECIAL, *sorted({*pre_tokenizers.ByteLevel.alphabet()} - NEVER)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder

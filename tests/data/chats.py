"""Templates, conversations and a tokenizer for the tests of chats and of templates."""

from pathlib import Path

from tokenizers import pre_tokenizers

from qlora_jax.data.tokenizer import load_tokenizer

TEMPLATES = {
    path.stem: path.read_text() for path in Path(__file__).parent.glob("chat_templates/*.jinja")
}
CONTROL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>",
]  # fmt: skip
USER = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4. 🙂"}
SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
CHATS = {
    "question": [USER],
    "answered": [USER, ANSWER],
    "two turns": [USER, ANSWER, {"role": "user", "content": "Sure?"}, ANSWER],
    "spaces": [{"role": "user", "content": "  a \n"}, {"role": "assistant", "content": "\n b  "}],
    "null fields": [USER | {"name": None}, ANSWER | {"tool_calls": None}],
    "thoughts": [USER, ANSWER | {"reasoning": "Two and two."}],
    "system": [SYSTEM, USER, ANSWER],
    "tools": [
        SYSTEM,
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": "<é>"}}}],
        },
        {"role": "tool", "content": "4"},
        ANSWER,
    ],
}


def chat_tokenizer():
    """Of bytes and the markers above, each marker one token."""
    tokens = CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet())
    return load_tokenizer(
        "x.gguf",
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * 256,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.add_bos_token": True,
        },
    )

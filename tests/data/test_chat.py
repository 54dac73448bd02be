"""Chats: text equal to transformers', masks of what the assistant writes, bad messages."""

import pytest

from qlora_jax.data.chat import encode_chat, render_chat, stop_tokens
from qlora_jax.errors import InputError
from tests.data.chats import ANSWER, CHATS, SYSTEM, TEMPLATES, USER, chat_tokenizer

ENDS = {
    "chatml": "<|im_end|>",
    "chatml_generation": "<|im_end|>",
    "qwen25": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama31": "<|eot_id|>",
    "mistral": "</s>",
    "mistral_late_system": "</s>",
    "gemma": "<end_of_turn>",
    "zephyr": "</s>",
    "phi3": "<|end|>",
}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def masked_text(tokenizer, messages, template) -> str:
    ids, mask = encode_chat(tokenizer, messages, template)
    return tokenizer.decode([i for i, counted in zip(ids, mask, strict=True) if counted])


def transformers_text(tokenizer, messages, template, prompt) -> str | None:
    """What apply_chat_template gives; None where the template refuses the messages."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:
        return None


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_transformers_byte_for_byte(tokenizer, name, chat, prompt):
    golden = transformers_text(tokenizer, CHATS[chat], TEMPLATES[name], prompt)
    if golden is None:
        with pytest.raises(InputError, match="CHAT-"):
            render_chat(tokenizer, CHATS[chat], TEMPLATES[name], prompt)
    else:
        assert render_chat(tokenizer, CHATS[chat], TEMPLATES[name], prompt) == golden
    if chat != "tools" and not (chat == "system" and name in ("gemma", "mistral")):
        assert golden is not None


@pytest.mark.parametrize("chat", ["answered", "two turns"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "qwen3"])
def test_the_mask_is_the_answers_and_their_ends(tokenizer, name, chat):
    turns = sum(message["role"] == "assistant" for message in CHATS[chat])
    masked = masked_text(tokenizer, CHATS[chat], TEMPLATES[name])
    before = " " if name in ("llama2", "mistral_late_system") else ""
    after = " " if name == "llama2" else ""
    assert masked == (before + ANSWER["content"] + after + ENDS[name]) * turns


def test_ids_are_the_templates_alone(tokenizer):
    ids, mask = encode_chat(tokenizer, CHATS["answered"], TEMPLATES["mistral"])
    assert ids.count(tokenizer.bos_token_id) == 1  # the tokenizer would add a second
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    expected = tokenizer.apply_chat_template(
        CHATS["answered"], chat_template=TEMPLATES["mistral"], return_dict=False
    )
    assert ids == expected
    assert len(ids) == len(mask)


def test_a_mask_token_by_token(tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]
    ids, mask = encode_chat(tokenizer, chat, TEMPLATES["phi3"], add_generation_prompt=True)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert list(zip(tokens, mask, strict=True)) == [
        ("<|user|>", False),
        ("Ċ", False),
        ("q", False),
        ("<|end|>", False),
        ("Ċ", False),
        ("<|assistant|>", False),
        ("Ċ", False),
        ("a", True),
        ("b", True),
        ("<|end|>", True),
        ("Ċ", False),
        ("<|assistant|>", False),
        ("Ċ", False),
    ]


def test_generation_marks_count_as_transformers_counts_them(tokenizer):
    template, chat = TEMPLATES["chatml_generation"], CHATS["two turns"]
    golden = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encode_chat(tokenizer, chat, template)
    assert ids == golden["input_ids"]
    assert mask == [bool(counted) for counted in golden["assistant_masks"]]
    assert any(mask)


def test_what_a_template_adds_to_an_answer_is_counted(tokenizer):
    masked = masked_text(tokenizer, CHATS["answered"], TEMPLATES["qwen3"])
    assert masked == f"<think>\n\n</think>\n\n{ANSWER['content']}<|im_end|>"


@pytest.mark.parametrize(
    ("name", "chat"),
    [
        ("qwen3", CHATS["two turns"]),  # thoughts vanish from earlier turns
        ("mistral_late_system", [SYSTEM, *CHATS["two turns"]]),  # the system text moves
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, name, chat):
    with pytest.raises(InputError, match=r"writes message [12], or what precedes it, in two ways"):
        encode_chat(tokenizer, chat, TEMPLATES[name])


def test_a_chat_that_begins_with_the_assistant_is_refused(tokenizer):
    with pytest.raises(InputError, match="message 0 is the assistant's") as caught:
        encode_chat(tokenizer, [ANSWER, USER], TEMPLATES["chatml"])
    assert caught.value.code == "CHAT-TURN"


def test_messages_are_left_as_they_are(tokenizer):
    chat = [USER | {"name": None}, ANSWER | {"thinking": "x"}]
    copies = [dict(message) for message in chat]
    encode_chat(tokenizer, chat, TEMPLATES["chatml"])
    assert chat == copies


@pytest.mark.parametrize("name", TEMPLATES)
def test_stop_tokens(tokenizer, name):
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    expected = (end,) if end == tokenizer.eos_token_id else (end, tokenizer.eos_token_id)
    assert stop_tokens(tokenizer, TEMPLATES[name]) == expected


def test_stop_tokens_without_a_template_are_eos(tokenizer):
    assert stop_tokens(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "CHAT-MESSAGES"),
        ("hello", "CHAT-MESSAGES"),
        ([{"content": "x"}], "CHAT-MESSAGES"),
        ([{"role": 5, "content": "x"}], "CHAT-MESSAGES"),
        ([USER | {"extra": object()}], "CHAT-MESSAGES"),
        ([USER | {"content": 5}], "CHAT-FAILED"),
        ([{"role": "user"}], "CHAT-UNDEFINED"),
        ([USER | {"content": "\ud800"}], "CHAT-TEXT"),
    ],
)
def test_bad_messages_are_refused(tokenizer, messages, code):
    with pytest.raises(InputError) as caught:
        encode_chat(tokenizer, messages, TEMPLATES["chatml"])
    assert caught.value.code == code


def test_no_template_is_an_error_and_a_named_default_is_used(tokenizer):
    with pytest.raises(InputError, match="no chat template") as caught:
        encode_chat(tokenizer, [USER])
    assert caught.value.code == "CHAT-NONE"
    tokenizer.chat_template = {"default": TEMPLATES["phi3"], "tool_use": "{{ x }}"}
    try:
        assert render_chat(tokenizer, [USER]).startswith("<|user|>\n")
    finally:
        tokenizer.chat_template = None

"""Chats: text equal to transformers', masks of what the assistant writes, bad templates."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from qlora_jax.data.chat import encode_chat, render_chat, stop_tokens
from qlora_jax.data.template import RENDERER, Renderer
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError

TEMPLATES = {
    path.stem: path.read_text() for path in Path(__file__).parent.glob("chat_templates/*.jinja")
}
CONTROL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>",
]  # fmt: skip
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


@pytest.fixture(scope="module")
def tokenizer():
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


INJECTIONS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' + 'ss__')|attr('mro') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ messages.append.__self__ }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.append(1) }}",
    "{% do messages.clear() %}",
    "{{ raise_exception.__globals__['os'].system('touch canary') }}",
    "{{ strftime_now.__code__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ dict.mro() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '%s'.format_map({}).__class__ }}",
    "{{ (messages|map(attribute='__class__')|list)[0] }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base.html' %}",
    "{{ url_for.__globals__ }}",
    "{{ config }}{{ config.items() }}",
    "{{ open('/etc/passwd').read() }}",
]


@pytest.mark.parametrize("template", INJECTIONS)
def test_injections_are_refused(tokenizer, template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="CHAT-"):
        render_chat(tokenizer, [USER], template)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "template"),
    [
        ("CHAT-SYNTAX", "{% for m in messages %}"),
        ("CHAT-SYNTAX", "{{ messages"),
        ("CHAT-SYNTAX", "{% endfor %}"),
        ("CHAT-SYNTAX", "{% nonsense %}"),
        ("CHAT-SYNTAX", "{{ 'x'|nonsense }}"),
        ("CHAT-RAISED", "{{ raise_exception('not like this') }}"),
        ("CHAT-UNDEFINED", "{{ messages[5].content.strip() }}"),
        ("CHAT-FAILED", "{{ 1 / 0 }}"),
        ("CHAT-FAILED", "{{ range(10**9) }}"),
        ("CHAT-SIZE", "x" * 65_537),
        ("CHAT-OUTPUT", "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}"),
        ("CHAT-MEMORY", "{{ 'a' * 2000000000 }}"),
        ("CHAT-MEMORY", "{{ 'a'.ljust(10**12) }}"),
        ("CHAT-MEMORY", "{{ '%1000000000d' % 1 }}"),
        ("CHAT-TIME", "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2),
        ("CHAT-TIME", "{{ 7 ** (10 ** 8) % 10 }}"),
    ],
)
def test_bad_templates_are_bounded_and_named(tokenizer, code, template):
    with pytest.raises(InputError) as caught:
        render_chat(tokenizer, [USER], template)
    assert caught.value.code == code
    assert len(str(caught.value)) < 700
    assert render_chat(tokenizer, [USER], "{{ 'still here' }}") == "still here"


def test_a_template_says_why_it_refuses(tokenizer):
    with pytest.raises(InputError, match="refuses the messages: Conversation roles must alternate"):
        render_chat(tokenizer, [USER, USER], TEMPLATES["mistral"])


def test_threads_share_the_renderer(tokenizer):
    texts = {}

    def work(name: str) -> None:
        for _ in range(20):
            texts[name] = render_chat(tokenizer, CHATS["answered"], TEMPLATES[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in ("chatml", "phi3", "gemma")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, text in texts.items():
        assert text == render_chat(tokenizer, CHATS["answered"], TEMPLATES[name])


def test_a_renderer_that_was_killed_is_replaced(tokenizer):
    render_chat(tokenizer, [USER], "x")
    RENDERER.child.kill()
    RENDERER.child.wait()
    with pytest.raises(InputError, match=f"status -{int(signal.SIGKILL)}"):
        render_chat(tokenizer, [USER], "x")
    assert render_chat(tokenizer, [USER], "x") == "x"


def test_closing_ends_the_process():
    renderer = Renderer()
    assert renderer.render("{{ a }}", [{"a": 1}, {"a": 2}]) == [("1", []), ("2", [])]
    child = renderer.child
    assert renderer.close() == 0
    assert child.returncode == 0
    assert renderer.close() is None


def render_in_a_fork(queue) -> None:
    queue.put((RENDERER.child is None, RENDERER.render("{{ a }}", [{"a": 3}])[0].text))
    RENDERER.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_a_fork_has_a_renderer_of_its_own():
    RENDERER.render("x", [{}])
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=render_in_a_fork, args=(queue,))
    process.start()
    assert queue.get() == (True, "3")
    process.join(timeout=30)
    assert process.exitcode == 0
    assert RENDERER.render("{{ a }}", [{"a": 4}])[0].text == "4"


def test_the_process_ends_with_its_parent():
    program = (
        "import os\n"
        "from qlora_jax.data.template import RENDERER\n"
        "RENDERER.render('x', [{}])\n"
        "print(RENDERER.child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=root, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while running(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")

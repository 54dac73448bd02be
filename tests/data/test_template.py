"""Templates run in a process of their own: what is refused or bounded, and how it lives."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_jax.data.chat import render_chat
from qlora_jax.data.template import RENDERER, Renderer
from qlora_jax.errors import InputError
from tests.data.chats import CHATS, TEMPLATES, USER, chat_tokenizer
from tests.tiers import slow


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


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
        slow(("CHAT-TIME", "{{ 7 ** (10 ** 8) % 10 }}")),
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

"""R25: chat templates of strangers run no code and stay within 2 s, 1 MiB of text and 256 MiB.

What each is refused with, and the text of real ones, is shown in tests/data; here, what they cost.
"""

import contextlib
import re
import resource
import threading
import time
from pathlib import Path

import pytest

from qlora_jax.data.template import Renderer
from qlora_jax.data.template_worker import MAX_MEMORY, MAX_OUTPUT, MAX_SECONDS
from qlora_jax.errors import InputError
from tests.data.chats import CHATS, TEMPLATES
from tests.data.test_template import INJECTIONS
from tests.tiers import tiered

RULE = "R25"
OWN_SECONDS = 1.0  # of CPU time for Python to start, twice
DOUBLED = "{% set ns = namespace(a=FIRST) %}" + "{% set ns.a = ns.a + ns.a %}" * 60
SORTED = "{{ (range(99999) | list | sort | length) * 0 }}"
SPENDERS = {
    "text": "{{ 'a' * 200000000 }}",
    "text in a loop": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "doubling": DOUBLED.replace("FIRST", "'a'"),
    "lists": DOUBLED.replace("FIRST", "[1]"),
    "padding": "{{ 'a'.ljust(10**11) }}",
    "format": "{{ '%999999999d' % 1 }}",
    "loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a power": "{{ 9 ** (9 ** 9) % 10 }}",
    "sorting": f"{{% for i in range(99999) %}}{SORTED}{{% endfor %}}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "joined": "{{ (range(99999) | join('a' * 9999)) | length }}",
}


def peak_of(pid: int) -> int:
    """The most memory that a process had, in bytes; 0 when it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) << 10 if found else 0


def children_seconds() -> float:
    """CPU time of all children that have ended; the clock's would be a busy machine's."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Watch:
    """Looks every few milliseconds at the most memory that a process had."""

    def __init__(self, pid: int):
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, peak_of(self.pid))

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()


@pytest.mark.parametrize("name", tiered(SPENDERS, ["doubling", "joined", "sorting"]))
def test_what_spends_is_stopped(name, record_property):
    spent = children_seconds()
    renderer = Renderer()
    renderer.render("x", [{}])
    before = peak_of(renderer.child.pid)
    try:
        with Watch(renderer.child.pid) as watch, pytest.raises(InputError, match="CHAT-") as caught:
            renderer.render(SPENDERS[name], [{"messages": CHATS["question"]}])
        assert renderer.render("{{ 'still here' }}", [{}])[0].text == "still here"
    finally:
        renderer.close()
    seconds = children_seconds() - spent
    record_property("slowest_seconds", seconds)
    record_property("largest_rss_growth_bytes", watch.peak - before)
    assert seconds < MAX_SECONDS + OWN_SECONDS
    assert watch.peak - before < MAX_MEMORY
    assert len(str(caught.value)) < MAX_OUTPUT


def test_injections_run_nothing(tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    renderer, passed = Renderer(), []
    try:
        for template in INJECTIONS:
            with contextlib.suppress(InputError):
                passed.append(renderer.render(template, [{"messages": CHATS["question"]}]))
    finally:
        renderer.close()
    record_property("cases", len(INJECTIONS))
    record_property("passed", len(INJECTIONS) - len(passed))
    assert passed == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_real_template_renders_at_no_cost(name):
    """Equal to transformers' text, as tests/data/test_chat.py shows."""
    renderer = Renderer()
    try:
        variables = {"messages": CHATS["answered"], "bos_token": "<s>", "eos_token": "</s>"}
        calls = [variables | {"add_generation_prompt": False}] * 100
        started = time.perf_counter()
        texts = {rendered.text for rendered in renderer.render(TEMPLATES[name], calls)}
    finally:
        renderer.close()
    assert time.perf_counter() - started < MAX_SECONDS
    assert len(texts) == 1
    assert "What is 2+2?" in texts.pop()

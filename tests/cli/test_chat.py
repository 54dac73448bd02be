"""A conversation on a pipe: answers on stdout, the rest on stderr, and every way to end it."""

import importlib
import io
import os
import re
import sys
from pathlib import Path

import jax
import pytest

from qlora_jax.adapters import init_lora
from qlora_jax.cli.chat import Chat, Clock, named_paths
from qlora_jax.cli.main import main
from qlora_jax.errors import InputError
from qlora_jax.workflows.adapter_folder import save_adapter
from qlora_jax.workflows.open import load
from tests.random_arrays import normals_like
from tests.tiny_model import FEW_TARGETS, write_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and two adapters of different ranks."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model")
    model, tokenizer = load(folder / "model")
    for seed, name in enumerate(("law", "sql")):
        adapter = init_lora(
            model, r=2 + seed, alpha=64, targets=FEW_TARGETS, key=jax.random.key(seed)
        )
        save_adapter(folder / name, normals_like(adapter, seed, size=0.2), model, tokenizer)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def chat(monkeypatch, capsys, text: str, *options: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["chat", "model", "--max-new-tokens", "4", *options]) == 0
    return capsys.readouterr()


def test_a_conversation(home, monkeypatch, capsys):
    heard = []
    generation = importlib.import_module("qlora_jax.inference.generate")
    real = generation.stream_batch

    def recorded(model, tokenizer, prompts, **options):
        heard.append((prompts[0], options["adapter"]))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generation, "stream_batch", recorded)
    out, err = chat(
        monkeypatch,
        capsys,
        "A\n\nB\n/adapter sql\nA\n/adapter none\n/reset\nA\n/quit\nnot heard\n",
        *("--adapter", "law=law", "--adapter", "sql=sql", "--system", "Hi"),
    )
    texts = [[message["content"] for message in messages] for messages, _ in heard]
    answer = texts[1][2]
    assert texts[0] == ["Hi", "A"]
    assert texts[1] == ["Hi", "A", answer, "B"]
    assert len(texts[2]) == 6
    assert texts[3] == ["Hi", "A"]
    ranks = [a and a.params["self_attn.q_proj"]["A"].shape[1] for _, a in heard]
    assert ranks == [2, 2, 3, None]
    assert out.replace("\0", "").startswith(f"{answer}\n")
    assert len(re.findall(r"^\d tokens?", err, re.MULTILINE)) == 4, err
    assert "adapter sql\n" in err
    assert "the conversation is forgotten\n" in err
    assert "weights dense: dequantized once" in err


def test_one_step_compiles_for_all_that_is_said(home, monkeypatch, capsys):
    from qlora_jax.inference.decode import advance

    advance.clear_cache()
    chat(monkeypatch, capsys, "a\nb\n/reset\nc\n", "--temperature", "1")
    assert advance._cache_size() == 1


def test_what_is_no_command_ends_nothing(home, monkeypatch, capsys):
    out, err = chat(
        monkeypatch, capsys, "/adapter lww\n/adapter\n/what\n/help\n", "--adapter", "law"
    )
    assert out == ""
    assert "error[CHAT-ADAPTER]: /adapter: no adapter 'lww' (expected one of law, none)" in err
    assert "Try: /adapter law." in err
    assert "this is law" in err
    assert "no command /what; /help lists them" in err
    assert "/reset          forget" in err


def test_a_conversation_that_is_too_long_says_so_and_goes_on(home, monkeypatch, capsys):
    out, err = chat(monkeypatch, capsys, f"{'a' * 3000}\n/help\n")
    assert "error[GEN-LENGTH]: prompt: " in err
    assert err.endswith("Ctrl-C\n")
    assert out == ""


def test_a_full_conversation_says_how_to_begin_again(home, monkeypatch, capsys):
    _, err = chat(monkeypatch, capsys, f"Hi\n{'a' * 3000}\n")
    assert err.splitlines()[-1].endswith("/reset begins another")


def test_ctrl_c_ends_it_cleanly(home, monkeypatch, capsys):
    def interrupted(self, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "hear", interrupted)
    out, err = chat(monkeypatch, capsys, "Hello\n")
    assert out == ""
    assert "interrupted" not in err


def test_what_cannot_be_opened_is_one_line(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert main(["chat", "model", "--adapter", "x=nothing"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "missing adapter" in error


def test_names_of_adapters(tmp_path):
    assert named_paths(["a=b/c", "d/e/"]) == {"a": "b/c", "e": "d/e/"}
    (tmp_path / "a=1").mkdir()
    assert named_paths([f"{tmp_path}/a=1"]) == {"a=1": f"{tmp_path}/a=1"}
    for given, match in ((["=x"], "no name and path"), (["a=x", "a=y"], "'a' comes twice")):
        with pytest.raises(InputError, match=match):
            named_paths(given)
    with pytest.raises(InputError, match="NAME=PATH"):
        named_paths(["none=x"])


def test_a_clock_counts_what_comes_after_the_first_token():
    clock = Clock()
    assert clock.told() == "0 tokens"
    clock.begun, clock.times = 10.0, [12.0]
    assert clock.told() == "1 token, the first after 2.00 s"
    clock.times = [12.0, 12.5, 13.0]
    assert clock.told() == "3 tokens, the first after 2.00 s, then 2.0 tokens per second"

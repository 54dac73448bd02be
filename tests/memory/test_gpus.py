"""GPUs by name and by size, and what is said of a name or a size that cannot be."""

import re

import pytest

from pallas_kernels.gpu import KNOWN
from qlora_jax.errors import InputError
from qlora_jax.memory.gpus import CONTEXT, GPUS, card, name_of


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)


def test_the_gpus_of_the_kernels_are_here_once():
    assert all(GPUS[name] is gpu for name, gpu in KNOWN.items())
    assert GPUS["a100-80gb"] is KNOWN["a100"]


@pytest.mark.parametrize("name", sorted(GPUS))
def test_programs_get_a_part_of_a_gpu(name):
    found = card(name.upper())
    assert 0.7 * GPUS[name].memory < found.memory <= GPUS[name].memory - CONTEXT
    assert found.link > 10e9
    assert found.flops > 1e12
    assert found.bandwidth > 1e11
    assert name_of(found.name) is not None


def test_xlas_share_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert card("rtx4090").memory == int(0.9 * 25.39e9)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1")
    assert card("rtx4090").memory == int(25.39e9) - CONTEXT
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "much")
    assert card("rtx4090").memory == int(0.75 * 25.39e9)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("8 GiB", 2**33), ("1.5gb", 1.5e9), ("512MB", 512e6)],
)
def test_a_size_is_all_for_programs(text, size):
    found = card(text)
    assert found.memory == size
    assert (found.flops, found.link) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx490", "error[GPU-NAME]: --gpu: unknown GPU 'rtx490' .*Try: --gpu rtx4090"),
        ("nothing", "error[GPU-NAME]: --gpu: unknown GPU 'nothing' .*Try: --gpu "),
        ("24", "error[GPU-SIZE]: --gpu: '24' has no unit .*Try: --gpu 24GB."),
        ("24 XB", "error[GPU-SIZE]: --gpu: unknown unit in '24 XB'"),
        ("0GB", "error[GPU-SIZE]: --gpu: '0GB' is no memory of a GPU"),
        ("999999TB", "error[GPU-SIZE]: --gpu: '999999TB' is no memory of a GPU"),
    ],
)
def test_what_is_no_gpu_is_said_in_one_line(text, message):
    with pytest.raises(InputError) as caught:
        card(text)
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    assert re.search(pattern, str(caught.value))
    assert "\n" not in str(caught.value)

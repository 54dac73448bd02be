"""Faults in the core are caught by the quick tier: a sample of them, and the list is whole."""

from random import Random

import pytest

from tests.faults.plant import ROOT, fails, faults, planted

FAULTS = faults()
SAMPLE = Random(0).sample([fault for fault in FAULTS if fault.test], 4)


def test_every_fault_can_be_planted():
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text()
        compile(planted(source, fault), fault.file, "exec")
        assert (ROOT / fault.test).exists(), fault


def test_at_least_sixty_name_the_test_that_fails():
    assert sum(fault.test != "" for fault in FAULTS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("fault", SAMPLE, ids=str)
def test_caught(fault):
    assert fails([fault.test], fault)


@pytest.mark.slow
def test_nothing_fails_without_a_fault():
    assert not fails([fault.test for fault in SAMPLE])

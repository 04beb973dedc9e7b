"""Every deliberate fault still has its one place, and tests that exist."""

from pathlib import Path

import pytest

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_has_one_place_and_tests(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text()
    assert fault.put_into(text) != text
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def test_no_place_and_two_places_are_errors() -> None:
    fault = Fault("twice", "a.py", "b", "c", ())
    assert fault.put_into("abc") == "acc"
    for text in ("a", "bb"):
        with pytest.raises(ValueError, match=f"a.py has {text.count('b')} places"):
            fault.put_into(text)

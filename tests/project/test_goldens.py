"""What every method does is what it did, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from goldens import cases, differences, read, run_case

RECORDED = read(Path(__file__).with_name("goldens.json"))


def test_every_case_is_recorded_and_every_record_a_case() -> None:
    assert set(cases()) == set(RECORDED)


@pytest.mark.parametrize("name", cases())
def test_bits_are_those_recorded(name: str) -> None:
    found = run_case(name)
    assert differences(found, RECORDED[name]) == []

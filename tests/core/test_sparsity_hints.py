"""Errors about a sparsity say what was probably meant."""

from __future__ import annotations

import pytest

import safe_core
from safe_core.patterns import as_pattern


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("90%", "got '90%': write 0.9 for 90 percent"),
        ("0.9", "got '0.9': pass the number 0.9"),
        ("1x4", "got '1x4': for blocks pass safe_core.Block((1, 4), 0.9)"),
        ("unstructured", "got 'unstructured': for single entries pass a number such as 0.9"),
        ("channels", "got 'channels': for channels pass safe_core.Channel(0.5)"),
        ("2-4", "got '2-4': use NM(2, 4)"),
        ("4:2", "got '4:2'"),
        ("half", "got 'half'"),
    ],
)
def test_a_text_that_is_no_sparsity_gets_a_hint(given: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be a number such as 0.95, or a") as found:
        safe_core.safe(given)
    assert str(found.value).endswith(hint)
    with pytest.raises(ValueError, match=r"^patterns of 'a': ") as found:
        as_pattern({"a": given})
    assert str(found.value).endswith(hint)


def test_a_pattern_of_fractions_points_to_the_other_pattern() -> None:
    for pattern in (safe_core.Unstructured, safe_core.Channel):
        with pytest.raises(TypeError, match=r"a Python number .* got '2:4': use NM\(2, 4\)$"):
            pattern("2:4")


@pytest.mark.parametrize(("given", "percent"), [(90, "90"), (90.0, "90"), (99.5, "99.5")])
def test_percent_as_a_number_gets_a_hint(given: float, percent: str) -> None:
    fraction = f"{float(percent) / 100:g}"
    with pytest.raises(
        ValueError, match=rf"such as 0.95, got .*: write {fraction} for {percent} per"
    ):
        safe_core.safe(given)
    with pytest.raises(ValueError, match=r"such as 0.95, got (1|200)$"):
        safe_core.safe(1)
    with pytest.raises(ValueError, match=r"such as 0.95, got (1|200)$"):
        safe_core.safe(200)

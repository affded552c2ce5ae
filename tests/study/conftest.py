"""Provide the fixture `xp`, and draw figures without embedded fonts."""

from __future__ import annotations

import matplotlib
import pytest
from array_backends import xp

__all__ = ["xp"]


@pytest.fixture(autouse=True)
def core_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not embed fonts in PDF files, because embedding takes most of the time of a report."""
    monkeypatch.setitem(matplotlib.rcParams, "pdf.use14corefonts", True)

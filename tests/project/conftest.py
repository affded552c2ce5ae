"""Fixtures of the tests of the project as a whole."""

from __future__ import annotations

from array_backends import xp

__all__ = ["xp"]

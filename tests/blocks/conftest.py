"""Tests here may take the fixture `xp`, which is every array backend in turn."""

from array_backends import xp

__all__ = ["xp"]

"""Provide the fixture `xp`, which runs a test once on every array backend."""

from array_backends import xp

__all__ = ["xp"]

"""Texts that every machine has: the source and documentation of Python's standard library."""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["documentation", "sentences", "source", "windows"]

_HELD_OUT = 20  # one file in 20 is held out


@cache
def source(held_out: bool) -> Tensor:
    """Return the concatenated bytes of the held-out files, or of all others."""
    text = b"".join(path.read_bytes() for path in _files(held_out))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(tokens: Tensor, samples: int, length: int, *, seed: int) -> Tensor:
    """Return windows of a text, drawn by the seed, of shape (samples, length)."""
    starts = np.random.default_rng(seed).integers(len(tokens) - length, size=samples)
    return tokens[torch.from_numpy(starts)[:, None] + torch.arange(length)]


@cache
def documentation(held_out: bool) -> str:
    """Return the docstrings of the held-out files, or of all others, joined."""
    return "\n\n".join(text for path in _files(held_out) for text in _docstrings(path) if text)


@cache
def sentences(held_out: bool, *, low: int = 6, high: int = 40) -> list[str]:
    """Return distinct docstring sentences of ``low`` to ``high`` words, in order."""
    found: dict[str, None] = {}
    for path in _files(held_out):
        for docstring in _docstrings(path):
            for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", docstring):
                words = sentence.split()
                if low <= len(words) <= high and sentence[0].isupper():
                    found[" ".join(words)] = None
    return list(found)


def _files(held_out: bool) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if skipped.isdisjoint(path.relative_to(root).parts)
        and (zlib.crc32(path.relative_to(root).as_posix().encode()) % _HELD_OUT == 0) == held_out
    ]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some files are invalid on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""

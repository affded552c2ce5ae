"""Find the line of the user's code that called into the library."""

from __future__ import annotations

import sys

# Frames between the user and the library: decorators, context managers, traced functions and the
# loops of trainers.
_PASSED = (
    "safe_core.",
    "contextlib",
    "torch.",
    "jax.",
    "optax.",
    "flax.",
    "accelerate.",
    "lightning.",
    "pytorch_lightning.",
    "transformers.",
)


def level_of_caller() -> int:
    """Return the ``stacklevel`` at which a warning of the calling function points to the user."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(_PASSED):
            break
        level, frame = level + 1, frame.f_back
    return level

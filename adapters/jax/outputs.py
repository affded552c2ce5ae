"""Compare the outputs of two networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["compare"]


def compare(wanted: Any, found: Any, message: str) -> None:
    """Raise a ValueError with a message unless the outputs of two networks agree up to rounding."""
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    for a, b in ((np.asarray(a), np.asarray(b)) for a, b in pairs):
        inexact = jnp.issubdtype(a.dtype, jnp.inexact)
        if inexact and bool(np.isnan(a).any()):
            raise ValueError("model must give numbers for example_inputs, got outputs that are NaN")
        eps = float(jnp.finfo(a.dtype).eps) if inexact else 0.0  # type: ignore[no-untyped-call]
        allowed = eps**0.5 * np.abs(a).max(initial=0)
        if a.shape != b.shape or not bool((np.abs(a - b) <= allowed).all()):
            raise ValueError(message)

"""Check an attack for signs of masked gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from .pgd import PGD

__all__ = ["MaskingReport", "masking_report"]

# Allowed relative decrease of the loss from one radius to the next.
_TOLERANCE = 1e-3


class MaskingReport(NamedTuple):
    """Results of checks that a working gradient attack passes.

    Attributes
    ----------
    radii : tuple of float
        Radii of the balls, increasing from 0.
    losses : tuple of float
        Mean cross entropy under the attack, for each radius.
    noise_losses : tuple of float
        Mean cross entropy under random noise on the boundary of the ball. Each input uses the
        worst of as many draws as the attack has steps.
    unbounded_accuracy : float
        Percentage of correct predictions when the attack can set pixels to any value.

    Examples
    --------
    >>> MaskingReport((0.0, 0.1), (0.2, 0.4), (0.2, 0.3), 40.0).faults
    ('an attack without bound leaves 40% right',)
    """

    radii: tuple[float, ...]
    losses: tuple[float, ...]
    noise_losses: tuple[float, ...]
    unbounded_accuracy: float

    @property
    def faults(self) -> tuple[str, ...]:
        """The failed checks in words; empty if nothing suggests masked gradients."""
        found = []
        for i, (radius, loss, noise) in enumerate(
            zip(self.radii, self.losses, self.noise_losses, strict=True)
        ):
            if i and loss < self.losses[i - 1] * (1 - _TOLERANCE):
                before = f"{self.losses[i - 1]:.4g} at {self.radii[i - 1]:g}"
                found.append(f"the loss falls with the radius: {before}, {loss:.4g} at {radius:g}")
            if i and loss < noise * (1 - _TOLERANCE):
                found.append(
                    f"random noise beats the attack at radius {radius:g}: loss {noise:.4g} "
                    f"against {loss:.4g}"
                )
        if self.unbounded_accuracy > 0:
            found.append(f"an attack without bound leaves {self.unbounded_accuracy:g}% right")
        return tuple(found)


def masking_report(
    logits_fn: Callable[[Any], Any],
    attacker: Callable[[PGD], Callable[..., Any]],
    inputs: Any,
    labels: Any,
    *,
    attack: PGD,
    factors: Sequence[float] = (0.5, 1, 2, 4),
    seed: int = 0,
) -> MaskingReport:
    """Check an attack on a few hundred inputs before you trust its results.

    The loss should increase with the radius, the attack should beat random noise, and an
    unbounded attack should make every prediction wrong.

    Parameters
    ----------
    logits_fn : callable
        Maps inputs to logits.
    attacker : callable
        Maps a `PGD` to the attacking function, such as ``functools.partial(attacker, model)``
        with the ``attacker`` of `safe_core.study.robustness.torch` or ``.jax``.
    inputs, labels : (n, ...) and (n,) arrays of the framework
    attack : PGD
        The attack to check.
    factors : sequence of float
        The radii to try, relative to the attack's radius, in increasing order.
    seed : int

    Returns
    -------
    MaskingReport

    References
    ----------
    Athalye et al. 2018, "Obfuscated gradients give a false sense of security"; Carlini et al.
    2019, "On evaluating adversarial robustness".

    Examples
    --------
    >>> import functools, torch
    >>> from safe_core.study.robustness.torch import attacker
    >>> model = torch.nn.Linear(2, 2).eval()
    >>> inputs = torch.rand(8, 2)
    >>> fool = functools.partial(attacker, model)
    >>> report = masking_report(
    ...     model, fool, inputs, model(inputs).argmax(1), attack=PGD("linf", 0.05)
    ... )
    >>> report.losses == tuple(sorted(report.losses))
    True
    """
    truth = _numpy(labels)

    def loss(x: Any) -> NDArray[np.float64]:
        return _cross_entropy(_numpy(logits_fn(x)), truth)

    clean = float(loss(inputs).mean())
    radii, losses, noise_losses = [0.0], [clean], [clean]
    for factor in factors:
        wider = replace(attack, radius=factor * attack.radius)
        radii.append(wider.radius)
        losses.append(float(loss(attacker(wider)(inputs, labels, seed)).mean()))
        noisy = (loss(x) for x in _noise(wider, inputs, seed))
        noise_losses.append(float(np.max(list(noisy), axis=0).mean()))
    span = attack.high - attack.low
    unbounded = replace(
        attack, norm="linf", radius=span, step_share=0.05, steps=100, random_start=False
    )
    moved = logits_fn(attacker(unbounded)(inputs, labels, seed))
    right = 100 * float(np.mean(_numpy(moved).argmax(axis=1) == truth))
    return MaskingReport(tuple(radii), tuple(losses), tuple(noise_losses), right)


def _noise(attack: PGD, inputs: Any, seed: int) -> list[Any]:
    """Return inputs moved to random points on the boundary of the ball, clipped to the range."""
    rng = np.random.default_rng([seed, 1])
    values = _numpy(inputs).astype(np.float64)
    found = []
    for _ in range(attack.steps):
        noise = rng.standard_normal(values.shape)
        if attack.norm == "linf":
            noise = np.sign(noise)
        else:
            axes = tuple(range(1, noise.ndim))
            noise /= np.sqrt(np.sum(noise**2, axis=axes, keepdims=True))
        moved = np.clip(values + attack.radius * noise, attack.low, attack.high)
        found.append(_like(moved, inputs))
    return found


def _cross_entropy(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def _numpy(x: Any) -> NDArray[Any]:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def _like(values: NDArray[Any], x: Any) -> Any:
    """Return values as an array with the library, the dtype and the device of ``x``."""
    xp = array_namespace(x)
    return xp.asarray(values, dtype=x.dtype, device=device(x))

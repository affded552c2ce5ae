"""Hold the values of schedules on the device, so that a CUDA graph can look them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Scheduled"]

_ROWS = 512  # steps that are computed at once
_SETTINGS = ("rho", "penalty")
_RATIO = ("ratio", 0)


class Scheduled:
    """The radius, the penalty and the ratio of the dual variable for the next steps.

    The schedules are computed on the host, as in any other step, and copied to a table on the
    device. A graph reads the row of its step and counts the step, so that it needs nothing of
    the host.

    Attributes
    ----------
    found_overflow : scalar tensor or None
        While a step is recorded: not 0 if it is to be skipped.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._device = device
        self.found_overflow: Tensor | None = None
        self._first = 0
        self._stop = 0
        self._next = 0
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._table = torch.zeros(_ROWS, 0, dtype=torch.float64, device=device)
        self._values: dict[tuple[str, int], Tensor] = {}

    def prepare(self) -> None:
        """Make the table hold the next step, and the device count from it."""
        step = self._run.steps
        is_over = not self._first <= step < self._stop
        if is_over:
            self._fill(step)
        if is_over or step != self._next:
            self._place.fill_(step - self._first)
        self._next = step + 1

    def _fill(self, step: int) -> None:
        rows = [self._row(step)]
        for later in range(step + 1, step + _ROWS):
            try:
                rows.append(self._row(later))
            except Exception:  # a schedule of the user may end; if it is needed, it raises then
                break
        self._first, self._stop = step, step + len(rows)
        found = torch.tensor(rows, dtype=torch.float64)
        if self._table.shape[1] != found.shape[1]:
            self._table = torch.zeros(_ROWS, found.shape[1], dtype=torch.float64).to(self._device)
        self._table[: len(rows)].copy_(found)

    def _row(self, step: int) -> list[float]:
        run = self._run
        found: list[Any] = []
        for setting in _SETTINGS:
            found += run.values_of_groups(setting, step)
        return [*found, float(run.method.constraint.dual_ratio(step))]

    # While a step is recorded

    def look_up(self) -> None:
        """Read the row of this step. The scalars are the same objects within the step."""
        row = self._table[self._place][0].unbind()
        keys = [(setting, i) for setting in _SETTINGS for i in range(len(self._run.groups))]
        self._values = dict(zip([*keys, _RATIO], row, strict=True))

    def of_groups(self, setting: str) -> list[Tensor]:
        """Return the values of a setting as scalar tensors, one for each param group."""
        return [self._values[setting, i] for i in range(len(self._run.groups))]

    @property
    def dual_ratio(self) -> Tensor:
        """The factor of the dual variable at this step."""
        return self._values[_RATIO]

    def take_overflow(self, overflow: Tensor, scale: Tensor | None) -> None:
        """Let the rest of the step change nothing where ``overflow`` is not 0.

        Gradients that are still multiplied by ``scale`` are divided by it, because the penalty is
        added to them.
        """
        base = self._run.base
        if not getattr(base, "_step_supports_amp_scaling", False):
            raise ValueError(
                "base must skip steps with overflow by itself in a CUDA graph, because the host "
                f"must not read it: pass fused=True, got {type(base).__name__} without"
            )
        if scale is not None:
            gradients = [p.grad for p in self._run.trainable() if p.grad is not None]
            torch._foreach_mul_(gradients, scale.double().reciprocal().float())
        self.found_overflow = overflow
        keeps = overflow == 0
        for key, value in self._values.items():
            if key[0] != "rho":  # no pull, and no change of u
                self._values[key] = torch.where(keeps, value, float(key == _RATIO))

    @contextmanager
    def skipping_base(self) -> Iterator[None]:
        """Let the base skip its step where there is overflow."""
        base: Any = self._run.base
        if self.found_overflow is None:
            yield
            return
        base.grad_scale, base.found_inf = None, self.found_overflow
        try:
            yield
        finally:
            del base.grad_scale, base.found_inf

    def kept(self, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
        """Return the new tensors, or the old ones in a step that is skipped."""
        if self.found_overflow is None:
            return list(new)
        keeps = self.found_overflow == 0
        return [torch.where(keeps, a, b) for a, b in zip(new, old, strict=True)]

    def count(self) -> None:
        """Count the step, unless it was skipped."""
        if self.found_overflow is None:
            self._place.add_(1)
        else:
            self._place.add_((self.found_overflow == 0).to(torch.int64))

    def end(self) -> bool:
        """End a recording; return whether a step can be skipped."""
        can_skip, self.found_overflow = self.found_overflow is not None, None
        return can_skip

    def read_steps(self) -> int:
        """Return the number of steps taken, for which the host waits."""
        self._next = self._first + int(self._place)
        return self._next

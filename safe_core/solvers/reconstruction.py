"""SAFE and SAFE+ as solvers of whole blocks: the recipe, without the training loop."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .. import _checks
from ..constraints import Constraint
from ..method import Method
from ..methods import admm, safe
from ..patterns import Pattern, Unstructured
from ..schedules import Constant
from .alps import ALPS
from .base import LayerSolver, Needs, Solver
from .registry import as_solver, named_solvers

__all__ = ["Reconstruction"]

_PUBLISHED: dict[str, Any] = {"rho": 2e-4, "penalty": 1e-3, "dual_update_interval": 32}
_PUBLISHED_RATE = 2e-4
_RATE = 0.01  # relative to the root mean square of the weights at the start
_ORDER: tuple[Needs, ...] = ("nothing", "squares", "gram")  # each can be computed from the next
SOME_STEPS = 1000  # of a run whose method is described or compared, when its length is unknown


@dataclass(frozen=True)
class Reconstruction(Solver):
    """Minimise the reconstruction error of a block under a sparsity constraint, by SAFE.

    ``f(x) = mean((block_x(inputs) - targets)**2)`` over all parameters x of the block. Its
    weights become sparse; biases and norms are trained too. The optimizer is Adam, with a linear
    warm-up and a linear decay of the learning rate.

    No setting has to be chosen. Training starts at the solution of `ALPS`: ``x_0 = z_0`` and
    ``u_0 = 0``. The learning rate is relative to the weights. The pull is that of
    ``safe_core.admm(sparsity, steps=T)`` for a run of T steps. Gradients are taken at x only,
    unless ``rho`` is given: a perturbation slowed the training and did not lower the error on
    held-out inputs where it was tried. If training increases the error, the start is kept. The
    two errors are means over batches, in float32 or wider.

    Attributes
    ----------
    method : Method, optional
        Replaces the method that is derived from the number of steps. Its sparsity is replaced by
        the requested one, which must be a schedule for `safe_core.gmp` and `safe_core.imp_sam`.
    learning_rate : float, optional
        The peak learning rate. By default it is 0.01 times the root mean square of the weights
        that are pruned, as training starts.
    betas : pair of float
        The betas of Adam.
    epochs : int
        Passes over the samples.
    warmup_epochs : int, optional
        Epochs of warm-up; ``min(2, epochs // 2)`` by default.
    batch_size : int
        Samples in a step.
    importance : {None, "wanda"}
        P of the projection: 1 (SAFE), or the mean square of each input feature in the dense
        block (SAFE+).
    rho, penalty, dual_update_interval : optional
        Arguments of `safe_core.safe`, if ``method`` is None. Each replaces what is derived.
    start : str, LayerSolver, class or callable, optional
        The layer-wise solver whose solution training starts at, by name or as
        `safe_core.solvers.as_solver` takes it. "dense" starts at the dense weights, and the
        sparsity of the derived method then rises. By default it is ALPS, or "dense" if
        ``published`` is set or a method is given.
    published : bool
        Whether all defaults are those of the paper for language models: the dense start, the
        learning rate 2e-4, rho 2e-4, K = 32 and a constant penalty of 1e-3.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", section 4.3,
    appendix B.4 and table 5.

    Examples
    --------
    >>> safe_plus = Reconstruction(importance="wanda")
    >>> safe_plus.name, safe_plus.needs, safe_plus.initial.name
    ('safe+', 'gram', 'alps')
    >>> [safe_plus.share(step, steps_per_epoch=16) for step in (0, 32, 256)]
    [0.03125, 1.0, 0.5]
    >>> Reconstruction(published=True).name
    'safe-published'
    """

    method: Method | None = None
    learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    epochs: int = 30
    warmup_epochs: int | None = None
    batch_size: int = 8
    importance: Literal["wanda"] | None = None
    rho: Any = None
    penalty: Any = None
    dual_update_interval: int | None = None
    start: Any = None
    published: bool = False

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, Method):
            raise TypeError(
                f"method must be a safe_core.Method or None, got {_checks.shown(self.method)}"
            )
        if self.learning_rate is not None:
            _checks.real("learning_rate", self.learning_rate, low=0.0)
        if not isinstance(self.betas, tuple | list):
            raise TypeError(f"betas must be a pair of numbers, got {_checks.shown(self.betas)}")
        if len(self.betas) != 2 or not all(0 <= _checks.real("betas", b) < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        _checks.integer("epochs", self.epochs, low=1)
        if _checks.integer("warmup_epochs", self.warmup, low=0) > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs={self.epochs}, got {self.warmup_epochs!r}"
            )
        _checks.integer("batch_size", self.batch_size, low=1)
        _checks.choice("importance", self.importance, (None, "wanda"))
        _checks.flag("published", self.published)
        _ = self.initial  # checks the start
        if self.method is None:
            self._derived(Unstructured(0.5), 1)  # checks the other options
            return
        if self.importance is not None and self.method.importance:
            raise ValueError(
                f"importance must be None where the method has {self.method.importance!r}, got "
                f"{self.importance!r}"
            )
        given = self._options() | ({"published": True} if self.published else {})
        for name, value in given.items():
            raise ValueError(
                f"{name} must be left out if a method is given, which has its own settings, got "
                f"{value!r}"
            )

    def _options(self) -> dict[str, Any]:
        """Return the arguments of `safe_core.safe` that are given."""
        given = {name: getattr(self, name) for name in _PUBLISHED}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name on the command line: "safe" or "safe+", and "-published" for the paper's."""
        name = "safe+" if self.importance else "safe"
        return f"{name}-published" if self.published else name

    @property
    def initial(self) -> LayerSolver | None:
        """The solver whose solution training starts at, or None for the dense weights."""
        if self.start is None:
            return None if self.published or self.method is not None else ALPS()
        if isinstance(self.start, str):
            _checks.choice("start", self.start, ("dense", *named_solvers(LayerSolver)))
            if self.start == "dense":
                return None
        found = as_solver(self.start)
        if not isinstance(found, LayerSolver):
            raise TypeError(
                f"start must be 'dense' or a solver that prunes layers, got {self.start!r}"
            )
        return found

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Which statistics of inputs are needed: those of the start, and squares for SAFE+."""
        first = self.initial
        own: Needs = "squares" if self.importance else "nothing"
        return max(own, "nothing" if first is None else first.needs, key=_ORDER.index)

    @classmethod
    def named(cls) -> tuple[Solver, ...]:
        """Return SAFE and SAFE+ with their default settings, and with those of the paper."""
        return tuple(
            cls(importance=importance, published=published)
            for published in (False, True)
            for importance in (None, "wanda")
        )

    @property
    def warmup(self) -> int:
        """The number of warm-up epochs."""
        return min(2, self.epochs // 2) if self.warmup_epochs is None else self.warmup_epochs

    def configured(self, *, batch_size: int, **training: Any) -> Reconstruction:
        """Return this solver with other settings of its training, see `Solver.configured`."""
        known = {field.name for field in fields(self)}
        given = {name: value for name, value in training.items() if value is not None}
        for name in given:
            if name not in known:
                raise ValueError(f"{name} must be left out for {self.name}, got {given[name]!r}")
        return replace(self, batch_size=batch_size, **given)

    def describe(self, pattern: Pattern, steps: int | None = None) -> list[tuple[str, str]]:
        """Return names and values of the settings under a pattern, for reports.

        Examples
        --------
        >>> dict(Reconstruction().describe(Unstructured(0.5), 480))["dual update interval (K)"]
        '3'
        """
        method, (first, second) = self.bound(pattern, steps or SOME_STEPS), self.betas
        radius = "none" if method.perturbation is None else _value(method.perturbation.rho, steps)
        if method.perturbation is not None and method.perturbation.in_steps:
            radius += " mean steps of the optimizer"
        ranked = "magnitude times norm of input" if self.importance else "magnitude"
        initial = self.initial
        rate = f"{self.peak(0.0):g}"
        if self.learning_rate is None and not self.published:
            rate = f"{_RATE:g} times the root mean square of the weights"
        return [
            ("solver", f"{type(self).__name__}, trained on the reconstruction error of each block"),
            (
                "starts at",
                "the dense weights" if initial is None else f"the solution of {initial.name}",
            ),
            (
                "weights ranked by",
                ranked if method.importance is None else f"`{method.importance!r}`",
            ),
            ("perturbation radius (rho)", radius),
            *self._constraint_settings(method.constraint, steps),
            ("optimizer", f"Adam, betas {first:g} and {second:g}"),
            ("peak learning rate", rate),
            ("epochs", str(self.epochs)),
            ("warm-up epochs", str(self.warmup)),
            *([] if steps is None else [("steps", f"{steps:,}")]),
        ]

    def _constraint_settings(
        self, constraint: Constraint, steps: int | None
    ) -> list[tuple[str, str]]:
        """Return the settings of a constraint that are not the default."""
        derives = self.method is None and not self.published
        derived = _PUBLISHED.keys() - self._options() if derives else ()
        rows = [("constraint", type(constraint).__name__)]
        for f in fields(constraint):
            value = getattr(constraint, f.name)
            if f.name in derived and steps is None:
                value = "derived from the number of steps"
            if f.name in _SYMBOLS or value != f.default:
                rows.append((_SYMBOLS.get(f.name, f.name.replace("_", " ")), _value(value, steps)))
        return rows

    def share(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at step t over its peak, a number in [0, 1].

        It is ``(t + 1) / W`` in the W steps of the warm-up. After them it is
        ``(T - t) / (T - W)``, at most 1, where T is the number of all steps.
        """
        rising, steps = (n * steps_per_epoch for n in (self.warmup, self.epochs))
        if step < rising:
            return (step + 1) / rising
        return min(1.0, (steps - step) / max(1, steps - rising))

    def peak(self, root_mean_square: Any) -> Any:
        """Return the peak learning rate.

        It is ``learning_rate`` if that is given, 2e-4 for the published settings, and otherwise
        ``0.01 * root_mean_square``. The argument is a number or a scalar array, the root mean
        square of all entries of the weights to prune as training starts.

        Examples
        --------
        >>> Reconstruction().peak(0.5), Reconstruction(published=True).peak(0.5)
        (0.005, 0.0002)
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return _PUBLISHED_RATE if self.published else _RATE * root_mean_square

    def bound(self, sparsity: Pattern, steps: int) -> Method:
        """Return the method with a sparsity, for a run of this many steps."""
        if self.method is None:
            return self._derived(sparsity, steps)
        if self.method.constraint.masks_gradients and sparsity.schedule is None:
            raise ValueError(
                "sparsity must change over time for a method of masks, such as "
                f"schedules.cubic(0.5, steps=1000), got {sparsity!r}"
            )
        return replace(self.method, sparsity=sparsity)

    def _derived(self, sparsity: Pattern, steps: int) -> Method:
        options = self._options()
        if self.published:
            return safe(sparsity, **_PUBLISHED | options)
        make = admm if self.rho is None else safe
        method = make(sparsity, steps=steps, **options)
        # A start that is sparse already has nothing to remove step by step.
        return method if self.initial is None else replace(method, sparsity=sparsity)


_SYMBOLS = {"penalty": "penalty (lambda)", "dual_update_interval": "dual update interval (K)"}


def _value(value: Any, steps: int | None) -> str:
    """Return a setting for a table; a schedule by its values in a run of so many steps."""
    if isinstance(value, (int, str)):
        return str(value)
    if isinstance(value, Constant):
        return f"{value.value:g}"
    if steps is None or not callable(value):
        return f"`{value!r}`"
    return f"{value(0):.3g} to {value(steps - 1):.3g} ({type(value).__name__.lower()})"

"""A method is a value, its parts make one iteration, and bad parts are refused by name."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from array_api_compat import array_namespace
from array_backends import Backend

import safe_core
from safe_core import (
    ADMM,
    ASAM,
    NM,
    SAM,
    ArrayInfo,
    AtEnd,
    Block,
    Channel,
    Evaluation,
    HardThreshold,
    Importance,
    Layout,
    Mask,
    Method,
    Point,
    SquaredGradient,
    Unstructured,
    admm,
    project,
    safe,
    schedules,
    stationarity_gap,
)
from safe_core.constraints.splitting import penalty_gradient

# A value

METHODS: dict[str, Callable[[], Method]] = {
    "safe": lambda: safe(0.9, rho=0.1, penalty=schedules.cosine(1e-3, steps=100)),
    "safe+": lambda: safe("2:4", importance=SquaredGradient(decay=0.9)),
    "asam": lambda: safe(Block((4, 4), 0.5), adaptive=True, relaxation=1.5),
    "admm": lambda: admm(Unstructured(schedules.cubic(0.9, steps=10)), dual_update_interval=4),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@every_method
def test_methods_are_values(make: Callable[[], Method]) -> None:
    method = make()
    for other in (make(), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other == method
        assert hash(other) == hash(method)
    assert replace(method, constraint=replace(method.constraint, dual_update_interval=99)) != method
    assert len({make() for make in METHODS.values()}) == len(METHODS)


@every_method
def test_methods_are_frozen(make: Callable[[], Method]) -> None:
    with pytest.raises(FrozenInstanceError):
        make().sparsity = 0.5


@every_method
def test_a_method_is_a_static_argument_of_jit(make: Callable[[], Method]) -> None:
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def finalize(x: Any, method: Method) -> Any:
        traces.append(method)
        layout = Layout((1,), (0,))
        return method.finalize([x], ArrayInfo(("x",), (layout,)))[0]

    x = np.random.default_rng(0).normal(size=(4, 4))
    for method in (make(), make()):
        wanted = project(x, method.sparsity).values
        np.testing.assert_array_equal(finalize(x, method), wanted)
    assert len(traces) == 1


def test_constructors_take_shorthands() -> None:
    assert safe(0.9) == Method(Unstructured(0.9), perturbation=SAM(0.1))
    assert safe("2:4", rho=0.2, adaptive=True) == Method(NM(2, 4), perturbation=ASAM(0.2))
    assert admm(0.9, penalty=0.5) == Method(0.9, ADMM(schedules.constant(0.5)))
    assert Block([2, 4], 0.5) == Block((2, 4), 0.5)
    assert Layout([1], [0]) == Layout((1,), (0,))


def test_a_method_knows_whether_it_perturbs() -> None:
    methods = [safe(0.9), safe(0.9, rho=0), admm(0.9), safe(0.9, rho=schedules.linear(0.1, 5))]
    assert [method.plan().perturbs for method in methods] == [True, False, False, True]
    with pytest.raises(ValueError, match="perturbation must not be None to perturb"):
        admm(0.9).perturb([np.ones(2)], [np.ones(2)], 0)


@pytest.mark.parametrize("interval", [1, 3, 32])
def test_dual_updates_close_every_interval(xp: Backend, interval: int) -> None:
    method = admm(0.9, dual_update_interval=interval)
    wanted = [step % interval == interval - 1 for step in range(70)]
    assert [bool(method.is_due(step)) for step in range(70)] == wanted
    traced = [xp.call(method.is_due, xp.asarray(np.asarray(t))) for t in range(0, 70, 5)]
    assert [bool(update) for update in traced] == wanted[::5]


@functools.cache
def rescale(method: Method) -> Any:
    return lambda split, step: method.constraint.rescale(split, step)


def test_the_dual_is_rescaled_as_the_penalty_changes(xp: Backend) -> None:
    method = admm(0.5, penalty=schedules.linear(4.0, steps=4), rescale_dual=True)
    split = safe_core.SplitState([np.asarray([2.0, -6.0])], [np.asarray([True, False])])
    # At step 1 the penalty before is 0, which has no quotient.
    ratios = {0: 1, 1: 1, 2: 1 / 2, 3: 2 / 3, 4: 3 / 4, 5: 1}
    for step, ratio in ratios.items():
        at = np.asarray(step) if xp.traces else step
        got = xp.run(rescale(method), split, at)
        np.testing.assert_allclose(got.anchor[0], [2.0, -6.0 * ratio], rtol=1e-15)
    untouched = xp.run(
        rescale(replace(method, constraint=replace(method.constraint, rescale_dual=False))),
        split,
        2,
    )
    np.testing.assert_array_equal(untouched.anchor[0], [2.0, -6.0])


def test_the_radius_follows_its_schedule_unless_it_is_given(xp: Backend) -> None:
    method = safe(0.9, rho=schedules.linear(0.4, steps=4))
    x, g = [np.ones(2)], [np.asarray([0.0, 2.0])]
    assert xp.run(functools.partial(method.perturb, step=2), x, g)[0].tolist() == [0.0, 0.2]
    e = xp.run(functools.partial(method.perturb, step=2, rho=0.5), x, g)
    assert e[0].tolist() == [0.0, 0.5]


def test_the_result_is_exactly_sparse_in_the_dtype_of_the_parameters(xp: Backend) -> None:
    dtype = np.float16 if np.dtype(np.float16) in xp.dtypes else np.float32
    x = np.asarray([[1, 2, 3, 4]], dtype)
    targets = ArrayInfo(("x",), (Layout((1,), (0,)),))

    def finalize(x: Any, importance: Any = None) -> Any:
        return safe(schedules.cubic(0.5, steps=9)).finalize([x], targets, importance)[0]

    plain = xp.run(finalize, x)
    assert (plain.dtype, plain.tolist()) == (dtype, [[0, 0, 3, 4]])
    weighted = xp.run(finalize, x, [np.asarray([[64, 64, 1, 1]], dtype)])
    assert weighted.tolist() == [[1, 2, 0, 0]]


def test_importance_is_one_pool_where_the_scope_is_global() -> None:
    source = SquaredGradient(0.0)
    gradients = [np.ones(2), np.zeros(2)]
    for sparsity, second in ((Unstructured(0.5), 0), (Unstructured(0.5, "tensor"), 1)):
        method = safe(sparsity, importance=source)
        state = source.refresh(method.init_importance(gradients), gradients)
        assert method.metric(state)[1].tolist() == [second, second]
    assert safe(0.5).init_importance(gradients) is None
    assert safe(0.5).metric(None) is None


# An iteration

STEPS, INTERVAL, RATE = 160, 4, 0.02
TARGETS = ArrayInfo(("w",), (Layout(input_axes=(0,), output_axes=(1,)),))


def problem() -> tuple[np.ndarray, ...]:
    """Inputs and targets of a linear model with noise, and its initial weight and bias."""
    rng = np.random.default_rng(0)
    shapes = (30, 6), (30, 4), (6, 4), (4,)
    return tuple(rng.normal(size=shape) for shape in shapes)


def loss_gradients(w: Any, c: Any, inputs: Any, targets: Any) -> list[Any]:
    """Of ``|inputs w + c - targets|^2 / 2``, with respect to w and c."""
    error = inputs @ w + c - targets
    return [inputs.T @ error, array_namespace(error).sum(error, axis=0)]


@functools.cache
def programs(method: Method) -> tuple[Any, Any]:
    """A base step and a dual update, as a training loop of one's own would call them."""

    def base_step(w: Any, c: Any, split: Any, t: Any, inputs: Any, targets: Any) -> Any:
        split = method.constraint.rescale(split, t)
        g = loss_gradients(w, c, inputs, targets)
        if method.plan().perturbs:
            e = method.perturb([w, c], g, t)
            g = loss_gradients(w + e[0], c + e[1], inputs, targets)
        total = g[0] + penalty_gradient(w, split.anchor[0], method.constraint.penalty(t))
        return w - RATE * total, c - RATE * g[1], split, g[0]

    def dual_update(w: Any, split: Any, state: Any, g: Any, t: Any) -> Any:
        if method.importance is None:
            return method.update([w], split, t, TARGETS, state), state
        state = method.importance.refresh(state, [g])
        return method.update([w], split, t, TARGETS, method.metric(state)), state

    return base_step, dual_update


def train(xp: Backend, method: Method, importance: Any) -> dict[str, np.ndarray]:
    base_step, dual_update = programs(method)
    inputs, targets, w, c = (xp.asarray(x) for x in problem())
    given = None if importance is None else [xp.asarray(importance)]
    split = method.init([w], TARGETS, given)
    state = method.init_importance([w]) if given is None else given
    for step in range(STEPS):
        t = jnp.asarray(step) if xp.traces else step
        w, c, split, g = xp.call(base_step, w, c, split, t, inputs, targets)
        if method.is_due(step):
            split, state = xp.call(dual_update, w, split, state, g, t)
    sparse = method.finalize(
        [w], TARGETS, state if method.importance is None else method.metric(state)
    )[0]
    trained = {"w": w, "c": c, "anchor": split.anchor[0], "sparse": sparse}
    return {name: xp.to_numpy(x) for name, x in trained.items()}


class Textbook(NamedTuple):
    """The iteration of `Method` in plain NumPy, with two arrays for ADMM."""

    penalty: Callable[[int], float]
    sparsity: Callable[[int], Fraction] = lambda t: Fraction(2, 5)
    rho: float = 0.0
    adaptive: bool = False
    decay: float | None = None
    importance: np.ndarray | None = None
    relaxation: float = 1.0
    rescale: bool = False

    def train(self) -> dict[str, np.ndarray]:
        inputs, targets, w, c = problem()
        p = self.importance

        def support(v: Any, t: int) -> Any:
            pattern = Unstructured(self.sparsity(t))
            return reference.select(v, pattern, None if p is None else [p], TARGETS.layouts)

        two = reference.TwoArrayADMM([w], functools.partial(support, t=0))
        for t in range(STEPS):
            if self.rescale and t > 0:
                two.rescale(self.penalty(t - 1) / self.penalty(t))
            g = loss_gradients(w, c, inputs, targets)
            e = self.perturbation([w, c], g)
            g = loss_gradients(w + e[0], c + e[1], inputs, targets)
            w = w - RATE * (g[0] + two.penalty_gradient([w], self.penalty(t))[0])
            c = c - RATE * g[1]
            if (t + 1) % INTERVAL == 0:
                if self.decay is not None:
                    p = (0 if p is None else self.decay * p) + (1 - self.decay) * g[0] ** 2
                two.dual_update([w], functools.partial(support, t=t + 1), self.relaxation)
        sparse = np.where(support([w], STEPS)[0], w, 0.0)
        return {"w": w, "c": c, "anchor": two.z[0] - two.u[0], "sparse": sparse}

    def perturbation(self, params: Any, gradients: Any) -> list[np.ndarray]:
        scale = [np.abs(params[0]) + 0.01, 1.0] if self.adaptive else [1.0, 1.0]
        scaled = [s * g for s, g in zip(scale, gradients, strict=True)]
        length = math.sqrt(sum(np.sum(v**2) for v in scaled))
        return [self.rho * s * v / length for s, v in zip(scale, scaled, strict=True)]


def cosine(t: int) -> float:
    return 0.5 * (1 - math.cos(math.pi * min(t / 100, 1))) / 2


def line(t: int) -> float:
    return 0.5 - 0.4 * min(t / 100, 1)


def cubic(t: int) -> Fraction:
    rest = 1 - Fraction(min(t // 10, 8), 8)
    return Fraction(2, 5) + (Fraction(1, 5) - Fraction(2, 5)) * rest**3


COSINE = schedules.cosine(0.5, steps=100)
LINE = schedules.linear(0.1, steps=100, initial=0.5)
CUBIC = Unstructured(schedules.cubic(0.4, steps=80, initial=0.2, every=10))
P = np.geomspace(0.01, 100, 24).reshape(6, 4)
RUNS = {
    "safe": (safe(0.4, penalty=COSINE), Textbook(cosine, rho=0.1)),
    "safe+": (
        safe(0.4, penalty=COSINE, importance=SquaredGradient(decay=0.9)),
        Textbook(cosine, rho=0.1, decay=0.9),
    ),
    "asam-rescaled": (
        safe(0.4, penalty=LINE, adaptive=True, rescale_dual=True),
        Textbook(line, rho=0.1, adaptive=True, rescale=True),
    ),
    "admm": (admm(0.4, penalty=0.5), Textbook(lambda t: 0.5)),
    "admm-gradual-relaxed": (
        admm(CUBIC, penalty=0.5, relaxation=1.5),
        Textbook(lambda t: 0.5, sparsity=cubic, relaxation=1.5),
    ),
    "admm-given-importance": (admm(0.4, penalty=0.5), Textbook(lambda t: 0.5, importance=P)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_textbook_iteration_on_every_backend(xp: Backend, name: str) -> None:
    method, textbook = RUNS[name]
    method = replace(method, constraint=replace(method.constraint, dual_update_interval=INTERVAL))
    got, wanted = train(xp, method, textbook.importance), textbook.train()
    np.testing.assert_array_equal(got["sparse"] != 0, wanted["sparse"] != 0)
    assert np.count_nonzero(got["sparse"] == 0) == 9
    for key, x in wanted.items():
        assert np.linalg.norm(got[key] - x) <= 1e-10 * np.linalg.norm(x), key


# Refusals

W = np.ones((2, 4))
X = np.ones(4)


class Unhashable(Importance):
    """An importance that cannot be part of a hashable method."""

    __hash__ = None


class BadSchedule:
    """A schedule that compares by value and has no hash."""

    __hash__ = None

    def __call__(self, step: Any) -> Any: ...


V, T = ValueError, TypeError
AT_X, PERTURBED = Evaluation(Point.X), Evaluation(Point.PERTURBED)
C_OF_X = Evaluation(Point.PROJECTED, "add")
RANDOM = schedules.random_sparsity((0.5, 0.7))
REUSING = SAM(0.1, interval=2, reuse=0.5)
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("sparsity", lambda: Unstructured(1.0), V, "1.0"),
    ("sparsity", lambda: Unstructured(1), V, "1"),
    ("sparsity", lambda: Unstructured(-0.1), V, "-0.1"),
    ("sparsity", lambda: Unstructured(math.nan), V, "nan"),
    ("sparsity", lambda: Unstructured(True), T, "True"),
    ("sparsity", lambda: Unstructured("0.5"), T, "'0.5'"),
    ("sparsity", lambda: Unstructured(None), T, "None"),
    ("sparsity", lambda: Unstructured(np.asarray(0.5)), T, "array(0.5)"),
    ("sparsity", lambda: Unstructured(jnp.asarray(0.5)), T, "Array(0.5"),
    ("sparsity", lambda: Unstructured(torch.tensor(0.5)), T, "tensor(0.5000)"),
    ("scope", lambda: Unstructured(0.5, "layer"), V, "'layer'"),
    ("scope", lambda: Unstructured(0.5, scope=None), V, "None"),
    ("n", lambda: NM(0, 4), V, "0"),
    ("n", lambda: NM(5, 4), V, "5"),
    ("n", lambda: NM(2.0, 4), T, "2.0"),
    ("m", lambda: NM(2, 0), V, "0"),
    ("m", lambda: NM(2, "4"), T, "'4'"),
    ("ragged", lambda: NM(2, 4, "pad"), V, "'pad'"),
    ("shape", lambda: Block(4, 0.5), T, "4"),
    ("shape", lambda: Block((4,), 0.5), T, "(4,)"),
    ("shape", lambda: Block((4, 0), 0.5), V, "0"),
    ("shape", lambda: Block((4, 2.5), 0.5), T, "2.5"),
    ("sparsity", lambda: Block((4, 4), 1.5), V, "1.5"),
    ("scope", lambda: Block((4, 4), 0.5, "row"), V, "'row'"),
    ("ragged", lambda: Block((4, 4), 0.5, ragged=None), V, "None"),
    ("sparsity", lambda: Channel(2), V, "2"),
    ("scope", lambda: Channel(0.5, "row"), V, "'row'"),
    ("input_axes", lambda: Layout(("in",)), T, "'in'"),
    ("input_axes", lambda: Layout(1), T, "1"),
    ("output_axes", lambda: Layout((1,), (0.0,)), T, "0.0"),
    ("batch_axes", lambda: Layout((1,), (0,), (True,)), T, "True"),
    ("axis", lambda: Layout((0,), (0,)), V, "Layout(input_axes=(0,), output_axes=(0,)"),
    ("value", lambda: schedules.constant("1"), T, "'1'"),
    ("value", lambda: schedules.constant(math.inf), V, "inf"),
    ("value", lambda: schedules.linear(math.nan, 10), V, "nan"),
    ("initial", lambda: schedules.linear(1.0, 10, None), T, "None"),
    ("steps", lambda: schedules.linear(1.0, 0), V, "0"),
    ("steps", lambda: schedules.cosine(1.0, 10.0), T, "10.0"),
    ("value", lambda: schedules.cubic(1.0, 10), V, "1.0"),
    ("initial", lambda: schedules.cubic(0.5, 10, initial=-0.1), V, "-0.1"),
    ("steps", lambda: schedules.cubic(0.5, -1), V, "-1"),
    ("start", lambda: schedules.cubic(0.5, 10, start=-1), V, "-1"),
    ("every", lambda: schedules.cubic(0.5, 10, every=3), V, "every=3"),
    ("every", lambda: schedules.cubic(0.5, 10, every=0), V, "0"),
    ("rho", lambda: SAM(-0.1), V, "-0.1"),
    ("rho", lambda: SAM("0.1"), T, "'0.1'"),
    ("rho", lambda: SAM(True), T, "True"),
    ("rho", lambda: SAM(schedules.constant(-1.0)), V, "Constant(value=-1.0)"),
    ("rho", lambda: SAM(schedules.linear(0.1, 5, -0.1)), V, "initial=-0.1"),
    ("rho", lambda: SAM(BadSchedule()), T, "BadSchedule"),
    ("eta", lambda: ASAM(0.5, eta=-1.0), V, "-1.0"),
    ("eta", lambda: ASAM(0.5, eta=None), T, "None"),
    ("decay", lambda: SquaredGradient(1.0), V, "1.0"),
    ("decay", lambda: SquaredGradient(-0.5), V, "-0.5"),
    ("decay", lambda: SquaredGradient("0.9"), T, "'0.9'"),
    ("sparsity", lambda: Method(1.0), V, "1.0"),
    ("sparsity", lambda: Method("2-4"), V, "'2-4'"),
    ("sparsity", lambda: Method("2:"), V, "'2:'"),
    ("sparsity", lambda: Method(":4"), V, "':4'"),
    ("n", lambda: Method("4:2"), V, "4"),
    ("sparsity", lambda: Method(None), T, "None"),
    ("sparsity", lambda: Method(Unstructured), T, "Unstructured"),
    ("sparsity", lambda: Method([0.5]), T, "[0.5]"),
    ("perturbation", lambda: Method(0.5, perturbation=0.1), T, "0.1"),
    ("perturbation", lambda: Method(0.5, perturbation=SAM), T, "SAM"),
    ("constraint", lambda: Method(0.5, 0.1), T, "0.1"),
    ("constraint", lambda: Method(0.5, ADMM), T, "ADMM"),
    ("evaluations", lambda: Method(0.5, evaluations=("x",)), T, "'x'"),
    ("evaluations", lambda: Method(0.5, evaluations=(C_OF_X,)), V, "C(x)"),
    ("evaluations", lambda: Method(0.5, evaluations=(AT_X, C_OF_X, C_OF_X)), V, "C(x)"),
    (
        "perturbation",
        lambda: Method(0.5, evaluations=(AT_X, Evaluation(Point.PERTURBED))),
        V,
        "None",
    ),
    (
        "reuse",
        lambda: Method(0.5, perturbation=REUSING, evaluations=(AT_X, PERTURBED, C_OF_X)),
        V,
        "reuse=0.5",
    ),
    ("interval", lambda: HardThreshold(0), V, "0"),
    ("importance_interval", lambda: AtEnd(1.5), T, "1.5"),
    (
        "sparsity",
        lambda: Method(schedules.random_sparsity((0.5, 0.7)), Mask()),
        V,
        "RandomSparsity",
    ),
    ("penalty", lambda: ADMM(penalty=-1e-3), V, "-0.001"),
    ("penalty", lambda: ADMM(penalty=np.ones(2)), T, "numpy.ndarray of shape (2,)"),
    ("penalty", lambda: ADMM(schedules.cosine(-1.0, 5)), V, "value=-1.0"),
    ("dual_update_interval", lambda: ADMM(dual_update_interval=0), V, "0"),
    ("dual_update_interval", lambda: ADMM(dual_update_interval=2.0), T, "2.0"),
    ("importance", lambda: Method(0.5, importance=W), T, "numpy.ndarray of shape"),
    ("importance", lambda: Method(0.5, importance="wanda"), T, "'wanda'"),
    ("importance", lambda: Method(0.5, importance=SquaredGradient), T, "SquaredGradient"),
    ("importance", lambda: Method(0.5, importance=Unhashable()), T, "Unhashable"),
    ("relaxation", lambda: ADMM(relaxation=0), V, "0"),
    ("relaxation", lambda: ADMM(relaxation=2.0), V, "2.0"),
    ("relaxation", lambda: ADMM(relaxation=None), T, "None"),
    ("rescale_dual", lambda: ADMM(rescale_dual=1), T, "1"),
    ("rescale_dual", lambda: ADMM(0, rescale_dual=True), V, "Constant(value=0.0)"),
    ("rescale_dual", lambda: ADMM(lambda t: t, rescale_dual=True), V, "lambda"),
    ("rho", lambda: safe(0.5, rho=-1), V, "-1"),
    ("penalty", lambda: safe(0.5, penalty="cosine"), T, "'cosine'"),
    ("adaptive", lambda: safe(0.5, adaptive="no"), T, "'no'"),
    ("relaxation", lambda: safe(0.5, relaxation=3), V, "3"),
    ("penalty", lambda: admm(0.5, penalty=math.nan), V, "nan"),
    ("dual_update_interval", lambda: admm(0.5, dual_update_interval=-1), V, "-1"),
    ("sparsity", lambda: project(W, 1.0), V, "1.0"),
    ("sparsity", lambda: project(W, np.asarray(0.5)), T, "array(0.5)"),
    ("arrays", lambda: project(3.0, 0.5), T, "float"),
    ("arrays", lambda: project(iter([W]), 0.5), T, "iterator"),
    ("arrays[1]", lambda: project([W, [1.0]], 0.5), T, "list"),
    ("arrays['w']", lambda: project({"w": None}, 0.5), T, "NoneType"),
    ("arrays", lambda: project(np.ones(2, np.longdouble), 0.5), T, str(np.dtype(np.longdouble))),
    ("arrays", lambda: project(torch.ones(2).to(torch.float8_e4m3fn), 0.5), T, "float8"),
    ("arrays", lambda: project(jnp.ones(2, jnp.float8_e4m3fn), 0.5), T, "float8"),
    ("importance", lambda: project([W, W], 0.5, [X]), V, "1"),
    ("importance", lambda: project([W, W], 0.5, X), T, "ndarray"),
    ("importance", lambda: project({"w": W}, 0.5, {"v": X}), V, "'v'"),
    ("importance of arrays", lambda: project(W, 0.5, np.ones(3)), V, "(3,)"),
    ("importance of arrays", lambda: project(W, 0.5, -1.0), V, "-1.0"),
    ("importance of arrays", lambda: project(W, 0.5, "wanda"), T, "str"),
    ("importance of arrays", lambda: project(W, 0.5, [1.0]), T, "list"),
    ("layout of arrays", lambda: project(np.asarray(1.0), NM(1, 1)), V, "unknown"),
    ("layout of arrays", lambda: project(W, NM(2, 4), layout=Layout()), V, "Layout("),
    ("layout of arrays", lambda: project(X, Channel(0.5)), V, "Layout("),
    ("layout", lambda: project(W, 0.5, layout="oi"), T, "'oi'"),
    ("layout", lambda: project([W, W], 0.5, layout=[Layout()]), V, "1"),
    ("layout", lambda: project({"w": W}, 0.5, layout={"v": Layout()}), V, "'v'"),
    ("input_axes of arrays", lambda: project(W, 0.5, layout=Layout((2,))), V, "(2,)"),
    ("output_axes of arrays", lambda: project(W, 0.5, layout=Layout((), (-3,))), V, "(-3,)"),
    ("arrays", lambda: project(W, 0.5, layout=Layout((1,), (-1,))), V, "(1,)"),
    (
        "input_axes of arrays",
        lambda: project(np.ones((2, 2, 2)), NM(1, 2), layout=Layout((2, 0), (1,))),
        V,
        "(2, 0)",
    ),
    (
        "arrays",
        lambda: project(np.ones((2, 2, 2)), NM(1, 2), layout=Layout((0, 2), (1,))),
        V,
        "(0, 2)",
    ),
    ("delta", lambda: stationarity_gap(X, X, 0, 0.5), V, "0"),
    ("delta", lambda: stationarity_gap(X, X, math.inf, 0.5), V, "inf"),
    ("delta", lambda: stationarity_gap(X, X, "1", 0.5), T, "'1'"),
    ("gradient", lambda: stationarity_gap(X, np.ones(3), 1.0, 0.5), V, "(3,)"),
    ("gradient", lambda: stationarity_gap([X], [X, X], 1.0, 0.5), V, "(4,)"),
    ("sparsity", lambda: stationarity_gap(X, X, 1.0, 1.0), V, "1.0"),
    ("activations", lambda: safe_core.importance.wanda(np.asarray(1.0)), V, "scalar"),
]


@pytest.mark.parametrize(
    ("argument", "make", "kind", "value"),
    BAD,
    ids=[f"{i}-{argument}-{value}" for i, (argument, _, _, value) in enumerate(BAD)],
)
def test_a_bad_argument_is_refused_by_name_and_value(
    argument: str, make: Callable[[], Any], kind: type[Exception], value: str
) -> None:
    with pytest.raises(kind) as refusal:
        make()
    assert refusal.type is kind
    message = str(refusal.value)
    assert argument in message
    assert value in message.rpartition("got ")[2]


def test_a_traced_sparsity_is_refused() -> None:
    with pytest.raises(TypeError, match=r"sparsity must be a fraction.*float32 arithmetic"):
        jax.jit(lambda x, s: project(x, s).values)(jnp.ones(4), 0.5)

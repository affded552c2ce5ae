"""What `sparse_optimizer` and its `finalize` promise."""

from __future__ import annotations

import functools
import pickle
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import linear_problem
import numpy as np
import optax
import pytest
from short_runs import short_run

import safe_core
from safe_core import NM, Layout, SquaredGradient, schedules
from safe_core.adapters.optax import (
    SparseOptimizerState,
    finalize,
    find_state,
    sparse_optimizer,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

INTERVAL = 2
METHOD = safe_core.safe(0.5, rho=0.2, penalty=0.3, dual_update_interval=INTERVAL)
INPUT_OUTPUT = Layout(input_axes=(0,), output_axes=(1,))
OUTPUT_INPUT = Layout(input_axes=(1,), output_axes=(0,))
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64]


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {
        "first": {"kernel": draw(6, 8), "bias": draw(8)},
        "second": {"kernel": draw(8, 4), "bias": draw(4)},
    }


def loss(params, rows=slice(None)):
    """Mean squared error of a small network on fixed data."""
    rng = np.random.default_rng(9)
    dtype = params["first"]["bias"].dtype
    inputs, targets = (jnp.asarray(rng.normal(size=(16, n)), dtype) for n in (6, 4))
    hidden = jnp.tanh(inputs[rows] @ params["first"]["kernel"] + params["first"]["bias"][None])
    output = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    return jnp.mean((output - targets[rows]) ** 2)


grad_fn = jax.grad(loss)


def stepper(tx, grad_fn=grad_fn):
    """``(params, state) -> (params, state)``, one step."""

    def step(params, state):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, steps, params=None, wrap=jax.jit):
    params = make_params() if params is None else params
    state = tx.init(params)
    step = wrap(stepper(tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_close(got, wanted, rtol=2e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == bool:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_equal(got, wanted):
    assert_close(got, wanted, rtol=0, atol=0)


def kernels(tree):
    return [tree[layer]["kernel"] for layer in ("first", "second")]


def count_zeros(arrays):
    return sum(int((np.asarray(a) == 0).sum()) for a in arrays)


# The step


@pytest.mark.every_second
@pytest.mark.parametrize("name", list(linear_problem.CASES))
def test_every_step_is_the_one_written_out_in_numpy(name, double_precision):
    method, recipe = linear_problem.CASES[name]
    problem = linear_problem.Problem.make()
    params = {"kernel": jnp.asarray(problem.weight.T), "bias": jnp.asarray(problem.bias)}
    base = optax.sgd(linear_problem.RATE, momentum=linear_problem.MOMENTUM)
    rate = linear_problem.RATE if method.plan().needs_learning_rate else None
    tx = sparse_optimizer(base, method, learning_rate=rate)

    def linear_loss(params):
        residual = problem.inputs @ params["kernel"] + params["bias"][None] - problem.targets
        return jnp.sum(residual**2) / (2 * len(problem.inputs))

    step = jax.jit(stepper(tx, jax.grad(linear_loss)))
    state = tx.init(params)
    first = state.support["kernel"]
    for point in linear_problem.trajectory(problem, recipe):
        params, state = step(params, state)
        np.testing.assert_allclose(params["kernel"].T, point.weight, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(params["bias"], point.bias, rtol=1e-10, atol=1e-11)
        np.testing.assert_array_equal(state.support["kernel"].T, point.z != 0)
        if method.constraint.has_anchor:
            anchor = point.z - point.u
            np.testing.assert_allclose(state.anchor["kernel"].T, anchor, rtol=1e-9, atol=1e-13)
    assert (state.anchor is not None) == method.constraint.has_anchor
    assert (first != state.support["kernel"]).any(), "the support must move to be tested"
    if method.constraint.has_anchor:
        assert (state.anchor["kernel"][~state.support["kernel"]] != 0).any(), "so must u"


@pytest.mark.usefixtures("library_promotes")
def test_jit_scan_and_eager_agree():
    tx = sparse_optimizer(optax.adam(0.05), METHOD)
    jitted = train(tx, INTERVAL + 1)
    eager = train(tx, INTERVAL + 1, wrap=lambda step: step)
    params, step = make_params(), stepper(tx)
    scanned, _ = jax.lax.scan(
        lambda carry, _: (step(*carry), None), (params, tx.init(params)), length=INTERVAL + 1
    )
    assert int(jitted[1].step) == INTERVAL + 1
    assert_close(eager, jitted)
    assert_close(scanned, jitted)


OPTIONS = {
    "safe": {},
    "every step": {"dual_update_interval": 1},
    "squared gradient": {"importance": SquaredGradient()},
    "relaxed": {"relaxation": 1.5},
    "schedules": {"rho": schedules.cosine(0.2, 9), "penalty": schedules.linear(0.3, 9)},
    "rescaled": {"penalty": schedules.linear(0.3, 9, initial=0.1), "rescale_dual": True},
    "cubic": {"sparsity": schedules.cubic(0.5, 8, every=2)},
}


@pytest.mark.every_second
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_never_change_and_a_step_is_traced_once(name, dtype):
    options = {"sparsity": 0.5, "dual_update_interval": INTERVAL, **OPTIONS[name]}
    tx = sparse_optimizer(optax.sgd(0.1, momentum=0.9), safe_core.safe(**options))
    step, traces = stepper(tx), []

    @jax.jit
    def counted(params, state):
        traces.append(1)
        return step(params, state)

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    params = make_params(dtype)
    carry = params, tx.init(params)
    before = types(carry)
    for _ in range(2 * INTERVAL):
        carry = counted(*carry)
        assert types(carry) == before
    assert len(traces) == 1


def test_vmap_over_seeds_is_each_run_alone():
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    runs = [make_params(seed=seed) for seed in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    carry, step = (together, jax.vmap(tx.init)(together)), stepper(tx)
    alone, jitted, mapped = (
        [(run, tx.init(run)) for run in runs],
        jax.jit(step),
        jax.jit(jax.vmap(step)),
    )
    for _ in range(INTERVAL + 1):
        carry = mapped(*carry)
        alone = [jitted(*one) for one in alone]
    for i, one in enumerate(alone):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], carry), one)


@pytest.mark.parametrize("rho", [0.1, "schedule", "array"])
def test_rho_and_penalty_override_those_of_the_method(rho):
    method = safe_core.safe(0.5, rho=0.1, penalty=0.2, dual_update_interval=INTERVAL)
    given = {
        "schedule": {"rho": lambda step: 0.1, "penalty": schedules.constant(0.2)},
        "array": {"rho": jnp.float32(0.1), "penalty": np.float32(0.2)},
    }.get(rho, {"rho": 0.1, "penalty": 0.2})
    wanted = train(sparse_optimizer(optax.sgd(0.1), method), 5)
    assert_close(train(sparse_optimizer(optax.sgd(0.1), METHOD, **given), 5), wanted)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (safe_core.admm(0.5), {}),
        (safe_core.safe(0.5, rho=0.0), {}),
        (METHOD, {"rho": 0.0}),
    ],
)
def test_a_method_without_perturbation_needs_no_grad_fn(method, options):
    tx = sparse_optimizer(optax.sgd(0.1), method, **options)
    params = make_params()
    state, gradients = tx.init(params), grad_fn(params)
    alone, _ = tx.update(gradients, state, params)

    def refuse(params):
        raise AssertionError("grad_fn must not be called")

    assert_equal(tx.update(gradients, state, params, grad_fn=refuse)[0], alone)
    anchor = state.anchor["first"]["kernel"]
    penalty = method.constraint.penalty(0) * (params["first"]["kernel"] - anchor)
    assert_close(alone["first"]["kernel"], -0.1 * (gradients["first"]["kernel"] + penalty))
    assert_close(alone["first"]["bias"], -0.1 * gradients["first"]["bias"])


def test_the_penalty_acts_on_the_kernels_alone():
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = make_params()
    nothing = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    state = tx.init(params)
    updates, _ = tx.update(nothing(params), state, params, grad_fn=nothing)
    for layer in ("first", "second"):
        assert not updates[layer]["bias"].any()
        kernel, anchor = params[layer]["kernel"], state.anchor[layer]["kernel"]
        assert_close(updates[layer]["kernel"], -0.1 * 0.3 * (kernel - anchor))
        assert updates[layer]["kernel"].any()


@short_run
@pytest.mark.every_second
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_dtypes_are_kept(dtype, double_precision):
    method = safe_core.safe(
        0.5, rho=0.2, penalty=0.3, dual_update_interval=1, importance=SquaredGradient()
    )
    tx = sparse_optimizer(optax.sgd(0.1), method)
    params = make_params(dtype)
    state = tx.init(params)
    updates, after = jax.jit(functools.partial(tx.update, grad_fn=grad_fn))(
        grad_fn(params), state, params
    )
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    for s in (state, after):
        assert {leaf.dtype for leaf in jax.tree.leaves(s.anchor)} == {jnp.dtype(wide)}
        assert {leaf.dtype for leaf in jax.tree.leaves(s.importance)} == {jnp.dtype(wide)}
        assert {leaf.dtype for leaf in jax.tree.leaves(s.support)} == {jnp.dtype(bool)}
        assert s.step.dtype == jnp.int32
    for tree in (updates, finalize(params, after, method)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}


@short_run
def test_sparsity_follows_a_cubic_schedule_to_its_last_count():
    sparsity = schedules.cubic(0.8, steps=8, initial=0.1, every=2)
    method = safe_core.safe(sparsity, rho=0.1, penalty=0.1, dual_update_interval=2)
    tx = sparse_optimizer(optax.sgd(0.1), method)
    params, size, stages = make_params(), 80, 4
    state, step = tx.init(params), jax.jit(stepper(tx))
    for t in range(12):
        left = (1 - Fraction(min(t // 2, stages), stages)) ** 3
        wanted = int(size * (Fraction(8, 10) - Fraction(7, 10) * left))
        assert sum(int((~s).sum()) for s in kernels(state.support)) == wanted, t
        params, state = step(params, state)
    assert count_zeros(kernels(finalize(params, state, method))) == 64


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_first_gradient_that_is_not_finite_is_skipped(bad):
    method = safe_core.safe(
        0.5, rho=0.2, penalty=0.3, dual_update_interval=1, importance=SquaredGradient()
    )
    plain = safe_core.admm(0.5, penalty=0.3, dual_update_interval=1, importance=SquaredGradient())
    params = make_params()
    first = grad_fn(params)
    first["first"]["bias"] = first["first"]["bias"].at[0].set(bad)
    tx, admm = (sparse_optimizer(optax.sgd(0.1), m) for m in (method, plain))
    got = tx.update(first, tx.init(params), params, grad_fn=grad_fn)
    assert_close(got, admm.update(grad_fn(params), admm.init(params), params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


# Among other transformations


def test_clipping_comes_before_and_into_grad_fn():
    method = safe_core.safe(0.5, rho=0.2, penalty=5.0, dual_update_interval=INTERVAL)
    clip = optax.clip_by_global_norm(0.01)

    def clipped(params):
        return clip.update(grad_fn(params), clip.init(params))[0]

    tx = optax.chain(clip, sparse_optimizer(optax.sgd(0.1), method))
    params = make_params()
    state = tx.init(params)
    anchor = find_state(state).anchor
    updates, state = jax.jit(functools.partial(tx.update, grad_fn=clipped))(
        grad_fn(params), state, params
    )
    g = grad_fn(params)
    length = optax.tree.norm(g)
    assert length > 0.01
    e = jax.tree.map(lambda g: 0.2 * g / length, g)
    second = clipped(jax.tree.map(jnp.add, params, e))
    for layer in ("first", "second"):
        assert_close(updates[layer]["bias"], -0.1 * second[layer]["bias"])
        penalty = 5.0 * (params[layer]["kernel"] - anchor[layer]["kernel"])
        assert_close(updates[layer]["kernel"], -0.1 * (second[layer]["kernel"] + penalty))


def test_injected_hyperparameters_change_without_a_new_trace():
    early, late = {"rho": 0.1, "penalty": 0.2}, {"rho": 0.4, "penalty": 0.05}
    inject = optax.inject_hyperparams(sparse_optimizer, static_args=("base", "method"))
    tx = inject(optax.sgd(0.1), METHOD, **early)
    params, traces = make_params(), []
    step = stepper(tx)

    @jax.jit
    def counted(params, state):
        traces.append(1)
        return step(params, state)

    state = tx.init(params)
    for t in range(2 * INTERVAL):
        if t == INTERVAL:
            state.hyperparams.update({k: jnp.float32(v) for k, v in late.items()})
        params, state = counted(params, state)
    assert len(traces) == 1
    switch = {k: lambda step, k=k: jnp.where(step < INTERVAL, early[k], late[k]) for k in early}
    wanted, scheduled = train(sparse_optimizer(optax.sgd(0.1), METHOD, **switch), 2 * INTERVAL)
    assert_close(params, wanted)
    assert_close(find_state(state).anchor, scheduled.anchor)
    constant, _ = train(sparse_optimizer(optax.sgd(0.1), METHOD, **early), 2 * INTERVAL)
    assert float(jnp.abs(constant["first"]["kernel"] - wanted["first"]["kernel"]).max()) > 1e-3


def test_apply_if_finite_keeps_a_bad_gradient_out():
    method = safe_core.safe(
        0.5, rho=0.2, penalty=0.3, dual_update_interval=1, importance=SquaredGradient()
    )
    tx = optax.apply_if_finite(sparse_optimizer(optax.sgd(0.1), method), 3)
    params, state = train(tx, 2)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grad_fn(params))
    updates, after = jax.jit(functools.partial(tx.update, grad_fn=lambda params: bad))(
        bad, state, params
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert_equal(find_state(after), find_state(state))
    step = jax.jit(stepper(tx))
    assert_equal(step(params, after)[0], step(params, state)[0])


def test_a_bad_second_gradient_does_not_reach_the_importance():
    method = safe_core.safe(0.5, dual_update_interval=1, importance=SquaredGradient())
    tx = sparse_optimizer(optax.sgd(0.0), method)
    params = make_params()
    bad = grad_fn(params)
    bad["first"]["kernel"] = bad["first"]["kernel"].at[0, 0].set(jnp.nan)
    _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=lambda params: bad)
    importance = state.importance["first"]["kernel"]
    assert float(importance[0, 0]) == 0
    assert (importance.ravel()[1:] > 0).all()


def test_extra_arguments_reach_the_base():
    def scale_by_value(updates, state, params=None, *, value, **extra):
        assert not extra
        return jax.tree.map(lambda u: value * u, updates), state

    base = optax.GradientTransformationExtraArgs(optax.init_empty_state, scale_by_value)
    tx = optax.chain(optax.clip(10.0), sparse_optimizer(optax.chain(base, optax.sgd(0.1)), METHOD))
    plain = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = make_params()
    got, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, value=3.0)
    wanted, _ = plain.update(grad_fn(params), plain.init(params), params, grad_fn=grad_fn)
    assert_close(got, jax.tree.map(lambda u: 3.0 * u, wanted))


def test_extra_arguments_may_meet_a_base_that_takes_none():
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = make_params()
    tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, value=3.0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
        lambda tx: optax.multi_transform(
            {"ours": tx, "theirs": optax.sgd(0.1)}, {"kernel": "ours", "bias": "theirs"}
        ),
    ],
    ids=["masked", "multi_transform"],
)
def test_masking_from_outside_is_refused(wrap):
    tx = wrap(sparse_optimizer(optax.sgd(0.1), METHOD))
    with pytest.raises(ValueError, match=r"masked or multi_transform; .*where="):
        tx.init(make_params()["first"])


@short_run
@pytest.mark.usefixtures("library_promotes")
def test_masking_within_the_base_works():
    base = optax.masked(optax.adam(0.1), {"first": True, "second": False})
    params, state = train(sparse_optimizer(base, METHOD), 2)
    assert count_zeros(kernels(finalize(params, state, METHOD))) == 40


@pytest.mark.usefixtures("library_promotes")
def test_multi_steps_needs_a_grad_fn_that_averages_too():
    def halves(params):
        parts = [grad_fn(params, rows) for rows in (slice(0, 8), slice(8, 16))]
        return jax.tree.map(lambda a, b: (a + b) / 2, *parts)

    inner = sparse_optimizer(optax.sgd(0.1), METHOD)
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    params = make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match="grad_fn"):
        tx.update(grad_fn(params), state, params)
    update = jax.jit(functools.partial(tx.update, grad_fn=halves))
    for step in range(4):
        half = grad_fn(params, slice(0, 8) if step % 2 == 0 else slice(8, 16))
        updates, state = update(half, state, params)
        params = optax.apply_updates(params, updates)
    wanted, whole = train(inner, 2)
    assert_close(params, wanted)
    assert_close(find_state(state).anchor, whole.anchor)


# The state


def test_state_is_kept_for_sparse_leaves_only():
    params = make_params()
    method = safe_core.safe(0.5, importance=SquaredGradient())
    state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    for tree in (state.anchor, state.support, state.importance):
        assert [leaf.shape for leaf in jax.tree.leaves(tree)] == [(6, 8), (8, 4)]
        assert tree["first"]["bias"] == optax.MaskedNode()
        assert tree["second"]["bias"] == optax.MaskedNode()
    assert sparse_optimizer(optax.sgd(0.1), METHOD).init(params).importance is None
    held = jax.tree.leaves((state.anchor, state.support))
    assert sum(leaf.nbytes for leaf in held) == 5 * 80


def test_state_starts_at_the_projection():
    params = make_params()
    state = sparse_optimizer(optax.sgd(0.1), METHOD).init(params)
    projection = safe_core.project(kernels(params), 0.5)
    assert_equal(kernels(state.anchor), projection.values)
    assert_equal(kernels(state.support), projection.support)
    assert int(state.step) == 0


@pytest.mark.usefixtures("library_promotes")
def test_state_is_a_pytree_that_saves():
    tx = sparse_optimizer(optax.adam(0.1), METHOD)
    params, state = train(tx, INTERVAL)
    leaves, treedef = jax.tree.flatten(state)
    assert isinstance(treedef.unflatten(leaves), SparseOptimizerState)
    assert_equal(jax.tree.map(lambda leaf: leaf, state), state)
    file = pickle.dumps(jax.tree.map(np.asarray, (params, state)))
    restored = pickle.loads(file)
    step = jax.jit(stepper(tx))
    # The first step compiled, the second, with its dual update, eager.
    assert_equal(step(*restored), step(params, state))
    wanted = step(*step(params, state))
    assert_close(step(*stepper(tx)(*restored)), wanted)
    assert_close(stepper(tx)(*jax.tree.map(np.asarray, step(*restored))), wanted)


def test_init_traces():
    params = make_params()
    tx = sparse_optimizer(optax.adam(0.1), METHOD)
    state = tx.init(params)
    assert_equal(jax.jit(tx.init)(params), state)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(
        lambda s: (s.shape, s.dtype), state
    )


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@short_run
@pytest.mark.parametrize(
    ("tree", "sparse"),
    [
        (lambda w, b: Layer(w, b), None),
        (lambda w, b: [w, b], "0"),
        (lambda w, b: (b, (w,)), "1/0"),
        (lambda w, b: {"layers": [Layer(w, b)]}, None),
        (lambda w, b: w, ""),
    ],
    ids=["NamedTuple", "list", "tuple", "nested", "array"],
)
def test_parameters_may_be_any_pytree(tree, sparse):
    params = tree(jnp.arange(1.0, 9.0).reshape(4, 2), jnp.ones(2))
    where = None if sparse is None else lambda path, leaf: path == sparse
    tx = sparse_optimizer(optax.sgd(0.1), METHOD, where=where)
    halve = lambda params: jax.tree.map(lambda p: p / 2, params)  # noqa: E731
    state = tx.init(params)
    updates, state = tx.update(halve(params), state, params, grad_fn=halve)
    params = finalize(optax.apply_updates(params, updates), state, METHOD)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert count_zeros(jax.tree.leaves(params)) == 4
    assert [leaf.shape for leaf in jax.tree.leaves(state.anchor)] == [(4, 2)]


# The choice of leaves


def test_where_is_asked_for_every_leaf():
    seen = []

    def where(path, leaf):
        seen.append((path, leaf.shape))
        return path == "second/bias"

    params = make_params()
    state = sparse_optimizer(optax.sgd(0.1), METHOD, where=where).init(params)
    assert sorted(seen) == [
        ("first/bias", (8,)),
        ("first/kernel", (6, 8)),
        ("second/bias", (4,)),
        ("second/kernel", (8, 4)),
    ]
    assert [leaf.shape for leaf in jax.tree.leaves(state.anchor)] == [(4,)]


@short_run
@pytest.mark.parametrize("true", [True, np.True_])
def test_where_may_be_a_pytree(true):
    where = {
        "first": {"kernel": False, "bias": False},
        "second": {"kernel": true, "bias": False},
    }
    params, state = train(sparse_optimizer(optax.sgd(0.1), METHOD, where=where), 2)
    zeros = [count_zeros([k]) for k in kernels(finalize(params, state, METHOD))]
    assert zeros == [0, 16]


# Layouts


def pruned(layout, pattern="2:4", name="kernel"):
    """A square kernel after `finalize`; ``layout`` goes to both functions."""
    params = {name: make_params()["first"]["kernel"][:4, :4]}
    method = safe_core.safe(pattern)
    tx = sparse_optimizer(optax.sgd(0.1), method, where=lambda *_: True, layout=layout)
    return np.asarray(finalize(params, tx.init(params), method, layout=layout)[name])


def is_2_4(weight, axis):
    return bool(((weight != 0).sum(axis=axis) == 2).all())


@short_run
@pytest.mark.parametrize(
    "layout",
    [
        OUTPUT_INPUT,
        Layout(input_axes=(-1,), output_axes=(-2,)),
        {"kernel": OUTPUT_INPUT},
        lambda path, leaf: OUTPUT_INPUT if (path, leaf.ndim) == ("kernel", 2) else None,
    ],
    ids=["layout", "negative axes", "mapping", "function"],
)
def test_layout_overrides_what_the_path_says(layout):
    assert is_2_4(pruned(layout), axis=1)
    assert not is_2_4(pruned(layout), axis=0)


@short_run
@pytest.mark.parametrize("layout", [None, {}])
def test_layout_of_the_path_holds_otherwise(layout):
    assert is_2_4(pruned(layout), axis=0)
    assert not is_2_4(pruned(layout), axis=1)


@short_run
@pytest.mark.parametrize(
    ("layout", "name"),
    [(None, "other"), ({"kernel": None}, "kernel"), (lambda path, leaf: None, "kernel")],
)
def test_an_unknown_layout_is_an_error_only_where_it_is_needed(layout, name):
    for pattern in ("2:4", safe_core.Channel(0.5), safe_core.Block((2, 2), 0.5)):
        with pytest.raises(ValueError, match=f"layout of {name} is unknown"):
            pruned(layout, pattern, name)
    assert count_zeros([pruned(layout, 0.5, name)]) == 8


# Importance


def importance_tree(params):
    """P of every leaf, from the parameters alone."""
    return jax.tree.map(lambda p: jnp.abs(jnp.cos(7 * p)).astype(jnp.float32), params)


def expected_support(v, importance):
    """The half of all entries with the largest ``P v^2``."""
    pairs = zip(v, importance, strict=True)
    scores = [np.sqrt(np.asarray(p)) * np.abs(np.asarray(x)) for x, p in pairs]
    threshold = np.sort(np.concatenate([s.ravel() for s in scores]))[-40]
    return [s >= threshold for s in scores]


GIVEN = {
    "pytree": lambda params: importance_tree(params),
    "mapping": lambda params: {
        f"{layer}/kernel": entry["kernel"] for layer, entry in importance_tree(params).items()
    },
    "pytree with None": lambda params: {
        layer: {"kernel": entry["kernel"], "bias": None}
        for layer, entry in importance_tree(params).items()
    },
    "per input": lambda params: {
        f"{layer}/kernel": entry["kernel"][:, 0] for layer, entry in importance_tree(params).items()
    },
    "per input, NumPy": lambda params: {
        f"{layer}/kernel": np.asarray(entry["kernel"][:, 0])
        for layer, entry in importance_tree(params).items()
    },
}


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("form", list(GIVEN))
def test_importance_given_at_the_start_decides_what_is_kept(form):
    params = make_params()
    full = kernels(importance_tree(params))
    if "per input" in form:
        full = [p[:, :1] for p in full]
    tx = sparse_optimizer(optax.sgd(0.1), METHOD, importance=GIVEN[form](params))
    wanted = expected_support(kernels(params), full)
    state = tx.init(params)
    assert_equal(kernels(state.support), [jnp.asarray(s) for s in wanted])
    assert any(
        (a != b).any()
        for a, b in zip(wanted, safe_core.project(kernels(params), 0.5).support, strict=True)
    )
    params, state = train(tx, 1)
    for got, p in zip(kernels(state.importance), full, strict=True):
        assert_equal(got, p)
    final = [k != 0 for k in kernels(finalize(params, state, METHOD))]
    assert_equal(final, [jnp.asarray(s) for s in expected_support(kernels(params), full)])


def test_importance_pytree_of_flat_parameters_may_name_every_leaf():
    params = make_params()["first"]
    importance = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    state = sparse_optimizer(optax.sgd(0.1), METHOD, importance=importance).init(params)
    assert state.importance["kernel"].shape == (6, 8)
    assert state.importance["bias"] == optax.MaskedNode()


@pytest.mark.parametrize("wrap", [jax.jit, lambda step: step], ids=["jit", "eager"])
def test_an_importance_function_is_called_at_dual_updates_with_the_new_parameters(wrap):
    seen = []

    def importance(params):
        jax.debug.callback(
            lambda kernel: seen.append(np.asarray(kernel)), params["first"]["kernel"]
        )
        return importance_tree(params)

    tx = sparse_optimizer(optax.sgd(0.1), METHOD, importance=importance)
    params = make_params()
    state = tx.init(params)
    assert_equal(kernels(state.support), safe_core.project(kernels(params), 0.5).support)
    assert all((p == 1).all() for p in kernels(state.importance))
    step = wrap(stepper(tx))
    wanted = []
    for t in range(2 * INTERVAL):
        before = state
        params, state = step(params, state)
        if (t + 1) % INTERVAL == 0:
            wanted.append(np.asarray(params["first"]["kernel"]))
            assert_close(kernels(state.importance), kernels(importance_tree(params)), atol=1e-5)
            u = [
                jnp.where(s, 0, -a)
                for s, a in zip(kernels(before.support), kernels(before.anchor), strict=True)
            ]
            v = [x + u_i for x, u_i in zip(kernels(params), u, strict=True)]
            support = expected_support(v, kernels(state.importance))
            assert_equal(kernels(state.support), [jnp.asarray(s) for s in support])
        else:
            assert_equal(state.importance, before.importance)
    jax.effects_barrier()
    assert len(seen) == 2
    for got, kernel in zip(seen, wanted, strict=True):
        np.testing.assert_allclose(got, kernel, rtol=1e-5)


def test_squared_gradient_is_refreshed_at_dual_updates_before_the_penalty():
    method = safe_core.safe(
        0.5, rho=0.2, penalty=50.0, dual_update_interval=2, importance=SquaredGradient(0.5)
    )
    tx = sparse_optimizer(optax.sgd(0.001), method)
    params = make_params()
    state, step = tx.init(params), jax.jit(stepper(tx))
    params, state = step(params, state)
    assert not any(p.any() for p in kernels(state.importance))
    g = grad_fn(params)
    length = optax.tree.norm(g)
    second = grad_fn(jax.tree.map(lambda p, g: p + 0.2 * g / length, params, g))
    _, state = step(params, state)
    wanted = [0.5 * g**2 for g in kernels(second)]
    assert_close(kernels(state.importance), wanted, rtol=1e-4)


# finalize


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_finalize_keeps_entries_bit_for_bit(dtype, double_precision):
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params, state = train(tx, 3, make_params(dtype))
    final = finalize(params, state, METHOD)
    integer = jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")
    for layer in ("first", "second"):
        assert_equal(final[layer]["bias"], params[layer]["bias"])
        bits, old = (
            jax.lax.bitcast_convert_type(t[layer]["kernel"], integer) for t in (final, params)
        )
        kept = final[layer]["kernel"] != 0
        assert (bits == jnp.where(kept, old, 0)).all()
    assert count_zeros(kernels(final)) == 40


@short_run
def test_finalize_takes_the_last_importance_another_or_none():
    method = safe_core.safe(
        0.5, rho=0.2, penalty=0.3, dual_update_interval=2, importance=SquaredGradient(0.5)
    )
    params, state = train(sparse_optimizer(optax.sgd(0.1), method), 5)
    given = importance_tree(params)
    mapping = {f"{layer}/kernel": entry["kernel"] for layer, entry in given.items()}
    ones = [jnp.ones_like(k) for k in kernels(params)]
    supports = []
    for options, p in (
        ({}, kernels(state.importance)),
        ({"importance": None}, ones),
        ({"importance": given}, kernels(given)),
        ({"importance": mapping}, kernels(given)),
    ):
        final = [np.asarray(k) != 0 for k in kernels(finalize(params, state, method, **options))]
        for got, wanted in zip(final, expected_support(kernels(params), p), strict=True):
            np.testing.assert_array_equal(got, wanted)
        supports.append(np.concatenate([f.ravel() for f in final]))
    assert len({support.tobytes() for support in supports}) == 3


@short_run
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.apply_if_finite(optax.chain(tx), 2),
        lambda tx: optax.MultiSteps(tx, 2),
    ],
)
def test_finalize_finds_the_state_anywhere(wrap):
    params = make_params()
    state = wrap(sparse_optimizer(optax.sgd(0.1), METHOD)).init(params)
    assert isinstance(find_state(state), SparseOptimizerState)
    assert count_zeros(kernels(finalize(params, state, METHOD))) == 40
    assert count_zeros(kernels(finalize(params, {"opt": [state, 1]}, METHOD))) == 40


@short_run
def test_finalize_compiles():
    params, state = train(sparse_optimizer(optax.sgd(0.1), METHOD), 2)
    compiled = jax.jit(finalize, static_argnums=2)(params, state, METHOD)
    assert_equal(compiled, finalize(params, state, METHOD))


def test_finalize_needs_one_state():
    params = make_params()
    state = sparse_optimizer(optax.sgd(0.1), METHOD).init(params)
    with pytest.raises(ValueError, match="found 0"):
        finalize(params, optax.sgd(0.1).init(params), METHOD)
    with pytest.raises(ValueError, match="found 2"):
        finalize(params, (state, state), METHOD)


# Arguments


def build(base=None, method=METHOD, params=None, **options):
    """Everything up to the first update."""
    base = optax.sgd(0.1) if base is None else base
    params = make_params()["first"] if params is None else params
    return sparse_optimizer(base, method, **options).init(params)


WITH_SOURCE = safe_core.safe(0.5, importance=SquaredGradient())
RESCALED = safe_core.safe(0.5, rescale_dual=True)
BAD_ARGUMENTS = {
    "base": ({"base": 0.1}, TypeError, "^base "),
    "base is a torch optimizer": ({"base": "sgd"}, TypeError, "^base "),
    "method": ({"method": 0.5}, TypeError, "^method "),
    "rho of admm": ({"method": safe_core.admm(0.5), "rho": 0.1}, ValueError, "^rho "),
    "rho is negative": ({"rho": -0.1}, ValueError, "^rho "),
    "rho is NaN": ({"rho": float("nan")}, ValueError, "^rho "),
    "rho is a string": ({"rho": "0.1"}, TypeError, "^rho "),
    "rho is no scalar": ({"rho": jnp.ones(2)}, ValueError, "^rho "),
    "penalty is negative": ({"penalty": -0.1}, ValueError, "^penalty "),
    "penalty is a flag": ({"penalty": True}, TypeError, "^penalty "),
    "penalty under rescaling": ({"method": RESCALED, "penalty": 0.1}, ValueError, "^penalty "),
    "where is a string": ({"where": "kernel"}, TypeError, "^where .*got the string"),
    "where is of another tree": ({"where": {"kernel": True}}, ValueError, "^where "),
    "where is of names": ({"where": {"kernel": "yes", "bias": "no"}}, TypeError, "^where "),
    "where chooses none": (
        {"where": lambda path, leaf: False}, ValueError, "where=.*bias, kernel"
    ),
    "no weight": ({"params": {"x": jnp.ones((2, 2))}}, ValueError, "where=.*paths are x"),
    "layout": ({"layout": (0, 1)}, TypeError, "^layout "),
    "layout of a name": ({"layout": {"kernel": 0}}, TypeError, "^layout of kernel "),
    "layout returned": ({"layout": lambda path, leaf: 0}, TypeError, "^layout of kernel "),
    "layout has other axes": (
        {"method": safe_core.safe("2:4"), "layout": Layout((2,), (0,))},
        ValueError,
        "input_axes of kernel",
    ),
    "importance twice": (
        {"method": WITH_SOURCE, "importance": {"kernel": 1.0}}, ValueError, "^importance "
    ),
    "importance is a string": ({"importance": "inputs"}, ValueError, "^importance "),
    "importance of a string": ({"importance": {"kernel": "a"}}, TypeError, "^importance of kernel"),
    "importance of no leaf": (
        {"importance": {"kernel": 1.0, "scale": 1.0}},
        ValueError,
        "^importance must name sparse parameters, kernel, got 'scale'",
    ),
    "importance is lacking": (
        {"importance": {"kernel": None, "bias": None}}, ValueError, "^importance .*'kernel'"
    ),
    "importance is negative": (
        {"importance": {"kernel": -jnp.ones((6, 8))}}, ValueError, "^importance of kernel"
    ),
    "importance is NaN": (
        {"importance": {"kernel": jnp.full(6, jnp.nan)}}, ValueError, "^importance of kernel"
    ),
    "importance has another shape": (
        {"importance": {"kernel": jnp.ones(5)}}, ValueError, "^importance of kernel"
    ),
    "importance returned": (
        {"importance": lambda params: {"scale": 1.0}}, ValueError, "^importance "
    ),
    "complex": (
        {"params": {"kernel": jnp.ones((2, 2)), "phase": jnp.ones(2) * 1j}},
        TypeError,
        "^phase must be real",
    ),
    "integers": ({"params": {"kernel": jnp.ones((2, 2), jnp.int32)}}, TypeError, "^kernel must"),
    "2:4 of six": ({"method": safe_core.safe(NM(2, 4))}, ValueError, "input axis of kernel"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_ARGUMENTS))
def test_a_bad_argument_is_named(name):
    options, error, message = BAD_ARGUMENTS[name]
    build()
    with pytest.raises(error, match=message):
        build(**options)


def test_params_must_be_passed():
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = make_params()
    with pytest.raises(ValueError, match="params must be passed"):
        tx.update(grad_fn(params), tx.init(params), grad_fn=grad_fn)


def test_grad_fn_must_be_passed():
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = make_params()
    with pytest.raises(ValueError, match=r"grad_fn must be .*at perturbed parameters, .*Train"):
        tx.update(grad_fn(params), tx.init(params), params)


def test_params_must_be_those_of_the_state():
    params = make_params()
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    state = tx.init(params)
    narrow = {**params, "first": {**params["first"], "kernel": params["first"]["kernel"][:1]}}
    message = r"^params must have the shapes .*\(6, 8\) for first/kernel, got \(1, 8\)"
    with pytest.raises(ValueError, match=message):
        tx.update(narrow, state, narrow, grad_fn=grad_fn)
    with pytest.raises(ValueError, match=message):
        finalize(narrow, state, METHOD)
    with pytest.raises(ValueError, match=r"^params must have the structure of those"):
        finalize(params["first"], state, METHOD)


def test_no_gradient_may_broadcast():
    params = make_params()
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    state, grads = tx.init(params), grad_fn(params)
    narrow = {**grads, "first": {**grads["first"], "bias": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"^updates must .*\(8,\) for first/bias, got \(1,\)"):
        tx.update(narrow, state, params, grad_fn=grad_fn)
    with pytest.raises(ValueError, match=r"^what grad_fn returns must have the shapes"):
        tx.update(grads, state, params, grad_fn=lambda params: narrow)


def test_gradients_must_have_the_structure_of_params():
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = make_params()
    state, gradients = tx.init(params), grad_fn(params)
    with pytest.raises(ValueError, match=r"^updates must have the structure"):
        tx.update(gradients["first"], state, params, grad_fn=grad_fn)
    with pytest.raises(ValueError, match="grad_fn returns must have the structure"):
        tx.update(gradients, state, params, grad_fn=jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "first"}, "^importance "),
        ({"importance": {"first/kernel": jnp.ones(6)}}, "lacks 'second/kernel'"),
        (
            {"importance": {"first/kernel": 1.0, "first/bias": 1.0}},
            "must name sparse parameters, .*got 'first/bias'",
        ),
    ],
)
def test_a_bad_importance_of_finalize_is_named(options, message):
    params = make_params()
    state = sparse_optimizer(optax.sgd(0.1), METHOD).init(params)
    with pytest.raises(ValueError, match=message):
        finalize(params, state, METHOD, **options)


@short_run
def test_finalize_refuses_another_layout_than_trained_with():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))}
    method = safe_core.admm("2:4")
    layout = Layout(input_axes=(1,), output_axes=(0,))
    tx = sparse_optimizer(optax.sgd(0.1), method, where=lambda *_: True, layout=layout)
    state = tx.init(params)
    kept = finalize(params, state, method, layout=layout)["w"] != 0
    np.testing.assert_array_equal(kept, state.support["w"])
    with pytest.raises(ValueError, match="layout must be those that state was trained with"):
        finalize(params, state, method, layout=Layout(input_axes=(0,), output_axes=(1,)))


def test_what_is_no_method_state_or_function_is_refused_by_name():
    params = {"kernel": jnp.ones((4, 2))}
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5))
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"method must be a safe_core\.Method, got 0\.9"):
        finalize(params, state, 0.9)
    with pytest.raises(TypeError, match="state must be that of sparse_optimizer"):
        tx.update(params, optax.sgd(0.1).init(params), params, grad_fn=lambda p: p)
    with pytest.raises(TypeError, match="grad_fn must be a function"):
        tx.update(params, state, params, grad_fn=params)
    named = {"nope": Layout()}
    with pytest.raises(ValueError, match=r"layout names 'nope'.*they are kernel"):
        sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5), layout=named).init(params)


def test_the_fields_of_the_state_stay():
    """Checkpoints outlive releases: a change here needs a way to load the old ones."""
    fields = ("step", "base", "anchor", "support", "importance", "flat_direction", "setup")
    assert SparseOptimizerState._fields == (*fields, "motion", "scale")
    assert set(SparseOptimizerState._field_defaults) == {
        "flat_direction",
        "setup",
        "motion",
        "scale",
    }

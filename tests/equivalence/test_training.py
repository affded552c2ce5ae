"""The same float64 run through NumPy, PyTorch and JAX gives the same numbers.

The NumPy loop calls the core directly, with gradients of a small network written by
hand; the others go through their adapters. Where a GPU is present the frameworks use it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from short_runs import short_run

import safe_core
from safe_core import ArrayInfo, SquaredGradient
from safe_core.adapters.optax import finalize, find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.functional import FunctionalStep, start
from safe_core.importance import Given, wanda
from safe_core.layout import OUTPUT_INPUT

STEPS, BATCH, SIZES = 300, 16, (12, 16, 8, 4)
LAYERS = len(SIZES) - 1
RATES = {"momentum": 0.05, "adam": 0.01}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Problem(NamedTuple):
    """Initial weights (output, input) and biases, and the batches in their order."""

    weights: list[np.ndarray]
    biases: list[np.ndarray]
    inputs: np.ndarray
    labels: np.ndarray

    @classmethod
    def make(cls) -> Problem:
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=(n, m)) / np.sqrt(m) for m, n in itertools.pairwise(SIZES)]
        biases = [0.1 * rng.normal(size=n) for n in SIZES[1:]]
        inputs = rng.normal(size=(STEPS, BATCH, SIZES[0])) * np.linspace(0.5, 2.0, SIZES[0])
        labels = np.argmax(np.tanh(inputs @ rng.normal(size=(SIZES[0], SIZES[-1]))), axis=-1)
        return cls(weights, biases, inputs, labels)

    def input_importance(self) -> list[np.ndarray]:
        """Wanda's P of every layer, one value per input feature, at the initial weights."""
        activations, found = self.inputs[0], []
        for w, b in zip(self.weights, self.biases, strict=True):
            found.append(wanda(activations))
            activations = np.tanh(activations @ w.T + b)
        return found


class Result(NamedTuple):
    """Weights (output, input) and supports after the run, and the projected weights."""

    weights: list[np.ndarray]
    biases: list[np.ndarray]
    supports: list[np.ndarray]
    projected: list[np.ndarray]


# NumPy


def gradients(params: list[np.ndarray], x: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Gradient of the mean cross entropy of a tanh network, by hand."""
    weights, biases = params[:LAYERS], params[LAYERS:]
    activations = [x]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        z = activations[-1] @ w.T + b
        activations.append(z if i == LAYERS - 1 else np.tanh(z))
    logits = activations[-1] - activations[-1].max(axis=1, keepdims=True)
    delta = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    dw, db = [], []
    for i in reversed(range(LAYERS)):
        dw.insert(0, delta.T @ activations[i])
        db.insert(0, delta.sum(axis=0))
        if i:
            delta = (delta @ weights[i]) * (1 - activations[i] ** 2)
    return dw + db


class Momentum:
    """SGD with momentum 0.9."""

    def __init__(self, params: list[np.ndarray]) -> None:
        self.buffers = [np.zeros_like(p) for p in params]

    def __call__(self, grads: list[np.ndarray]) -> list[np.ndarray]:
        self.buffers = [0.9 * m + g for m, g in zip(self.buffers, grads, strict=True)]
        return [-RATES["momentum"] * m for m in self.buffers]


class Adam:
    """Adam with the usual constants."""

    def __init__(self, params: list[np.ndarray]) -> None:
        self.m, self.v = [[np.zeros_like(p) for p in params] for _ in range(2)]
        self.t = 0

    def __call__(self, grads: list[np.ndarray]) -> list[np.ndarray]:
        self.t += 1
        self.m = [0.9 * m + 0.1 * g for m, g in zip(self.m, grads, strict=True)]
        self.v = [0.999 * v + 0.001 * g * g for v, g in zip(self.v, grads, strict=True)]
        first, second = 1 - 0.9**self.t, 1 - 0.999**self.t
        return [
            -RATES["adam"] * (m / first) / (np.sqrt(v / second) + 1e-8)
            for m, v in zip(self.m, self.v, strict=True)
        ]


def run_numpy(problem, method, base, importance):
    params = [*problem.weights, *problem.biases]
    info = ArrayInfo(tuple(f"weight {i}" for i in range(LAYERS)), (OUTPUT_INPUT,) * LAYERS)
    source = None
    if importance is not None:
        source = Given(lambda _: [p[None, :] for p in importance])
    sparse = range(LAYERS)
    state = start(method, params, sparse, info, source)
    optimizer = {"momentum": Momentum, "adam": Adam}[base](params)
    for t, batch in enumerate(zip(problem.inputs, problem.labels, strict=True)):
        at = lambda params, batch=batch: gradients(params, *batch)  # noqa: E731
        step = FunctionalStep(method, params, sparse, info, t, at, optimizer, importance=source)
        step.learning_rate = RATES[base]
        step.layouts = [*info.layouts, *(None,) * LAYERS]
        params, state = step.run(at(params), state)
    metric = method.metric(state.importance, source=source)
    projected = method.finalize(params[:LAYERS], info, metric)
    return Result(params[:LAYERS], params[LAYERS:], state.split.support, projected)


# PyTorch


def run_torch(problem, method, base, importance):
    layers = [torch.nn.Linear(m, n) for m, n in itertools.pairwise(SIZES)]
    model = torch.nn.Sequential(
        *(part for layer in layers[:-1] for part in (layer, torch.nn.Tanh())), layers[-1]
    )
    model = model.double().to(DEVICE)
    for layer, w, b in zip(layers, problem.weights, problem.biases, strict=True):
        layer.weight.data = torch.tensor(w, device=DEVICE)
        layer.bias.data = torch.tensor(b, device=DEVICE)
    if base == "momentum":
        inner = torch.optim.SGD(model.parameters(), lr=RATES[base], momentum=0.9)
    else:
        inner = torch.optim.Adam(model.parameters(), lr=RATES[base])
    if importance is not None:
        importance = {
            f"{2 * i}.weight": torch.tensor(p, device=DEVICE) for i, p in enumerate(importance)
        }
    optimizer = SparseOptimizer(inner, method, model=model, importance=importance)
    for x, labels in zip(problem.inputs, problem.labels, strict=True):
        x, labels = torch.tensor(x, device=DEVICE), torch.tensor(labels, device=DEVICE)

        def closure(x=x, labels=labels):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            return loss

        optimizer.step(closure)

    def read(tensors):
        return [t.detach().cpu().numpy().copy() for t in tensors]

    weights, biases = read(layer.weight for layer in layers), read(layer.bias for layer in layers)
    supports = read(optimizer.split().support)
    optimizer.finalize()
    return Result(weights, biases, supports, read(layer.weight for layer in layers))


# JAX


class Network(linen.Module):
    """The network in Flax, whose kernels are (input, output)."""

    @linen.compact
    def __call__(self, x):
        for i, n in enumerate(SIZES[1:]):
            x = linen.Dense(n, param_dtype=jnp.float64, precision="highest")(x)
            x = x if i == LAYERS - 1 else jnp.tanh(x)
        return x


def run_jax(problem, method, base, importance):
    model = Network()
    params = {
        "params": {
            f"Dense_{i}": {"kernel": jnp.asarray(w.T), "bias": jnp.asarray(b)}
            for i, (w, b) in enumerate(zip(problem.weights, problem.biases, strict=True))
        }
    }
    if importance is not None:
        importance = {f"params/Dense_{i}/kernel": p for i, p in enumerate(importance)}
    rate = RATES[base]
    inner = optax.sgd(rate, momentum=0.9) if base == "momentum" else optax.adam(rate)
    tx = sparse_optimizer(
        inner,
        method,
        importance=importance,
        learning_rate=rate if method.plan().needs_learning_rate else None,
    )

    def loss(params, x, labels):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def train(params, state, inputs, labels):
        def step(carry, batch):
            params, state = carry
            grad_fn = lambda params: jax.grad(loss)(params, *batch)  # noqa: E731
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (inputs, labels))[0]

    params, state = train(params, tx.init(params), problem.inputs, problem.labels)
    projected = finalize(params, state, method)

    def kernels(tree):
        return [np.asarray(tree["params"][f"Dense_{i}"]["kernel"]).T for i in range(LAYERS)]

    biases = [np.asarray(params["params"][f"Dense_{i}"]["bias"]) for i in range(LAYERS)]
    return Result(kernels(params), biases, kernels(find_state(state).support), kernels(projected))


# The comparison

METHODS = {"safe": safe_core.safe, "admm": safe_core.admm}
BASES = ("momentum", "adam")
SPARSITIES = (0.8, "2:4")
IMPORTANCE = ("none", "squared gradient", "inputs")


def relative_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_frameworks_agree_on_safe(base, sparsity, importance):
    assert_agreement_with_penalty("safe", base, sparsity, importance)


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_frameworks_agree_on_admm(base, sparsity):
    assert_agreement_with_penalty("admm", base, sparsity, "none")


@pytest.mark.long  # the importance acts in SAFE as in ADMM
@short_run
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("importance", IMPORTANCE[1:])
def test_frameworks_agree_on_admm_with_an_importance(base, sparsity, importance):
    assert_agreement_with_penalty("admm", base, sparsity, importance)


def assert_agreement_with_penalty(name, base, sparsity, importance):
    problem = Problem.make()
    method = METHODS[name](
        sparsity,
        penalty=safe_core.schedules.cosine(0.1, steps=STEPS),
        dual_update_interval=8,
        importance=SquaredGradient(0.9) if importance == "squared gradient" else None,
    )
    arrays = problem.input_importance() if importance == "inputs" else None
    expected = assert_agreement(problem, method, base, arrays)
    # The run must move the support too, or agreement would mean little.
    start = safe_core.project(problem.weights, sparsity).support
    assert any((a != b).any() for a, b in zip(start, expected.supports, strict=True))


def assert_agreement(problem, method, base, arrays=None):
    """Run in NumPy and in both frameworks; return what NumPy gives."""
    expected = run_numpy(problem, method, base, arrays)
    assert relative_distance(expected.weights[0], problem.weights[0]) > 0.1
    for run in (run_torch, run_jax):
        result = run(problem, method, base, arrays)
        for got, wanted in zip(result.supports, expected.supports, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=run.__name__)
        for field in ("weights", "biases", "projected"):
            for got, wanted in zip(getattr(result, field), getattr(expected, field), strict=True):
                assert relative_distance(got, wanted) < 1e-10, (run.__name__, field)
    return expected


@pytest.mark.every_second
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_frameworks_agree_on_what_is_derived_from_the_steps(name, base, sparsity):
    problem = Problem.make()
    expected = assert_agreement(problem, METHODS[name](sparsity, steps=STEPS), base)
    start = safe_core.project(problem.weights, sparsity).support
    assert any((a != b).any() for a, b in zip(start, expected.supports, strict=True))


MULTI = safe_core.schedules.random_sparsity((0.5, 0.7, 0.9))
VARIANTS = {
    "safe sg multi": safe_core.safe(
        MULTI, penalty=0.1, dual_update_interval=8, projected_gradient=True
    ),
    "decoupled": safe_core.safe(0.8, penalty=1.0, dual_update_interval=8, decoupled=True),
    "untuned, at times": safe_core.safe(0.8, steps=120, perturbation_interval=2, reuse=0.5),
    "cram plus multi": safe_core.cram(MULTI, rho=0.1, plus=True),
    "imp": safe_core.imp_sam(
        safe_core.schedules.cubic(0.8, steps=48, every=16), importance=SquaredGradient(0.9)
    ),
    "adasap": safe_core.adasap(
        safe_core.Channel(
            safe_core.schedules.exponential_sparsity(0.4, steps=24, start=12, every=4), "global"
        ),
        rho_max=0.5,
        rho=0.5,
    ),
}


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("name", list(VARIANTS))
def test_frameworks_agree_on_variants(name):
    problem = Problem.make()
    short = problem._replace(inputs=problem.inputs[:60], labels=problem.labels[:60])
    assert_agreement(short, VARIANTS[name], "momentum")


def test_the_comparison_sees_a_small_difference():
    problem = Problem.make()
    method = safe_core.safe(0.8, penalty=0.1, dual_update_interval=8)
    other = safe_core.safe(0.8, penalty=0.1 * (1 + 1e-6), dual_update_interval=8)
    a, b = (run_numpy(problem, m, "momentum", None) for m in (method, other))
    assert relative_distance(a.weights[0], b.weights[0]) > 1e-10

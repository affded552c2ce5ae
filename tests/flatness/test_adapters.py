"""Losses of modules and pytrees: their Hessians, and what measuring leaves behind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_backends import bits
from jax.flatten_util import ravel_pytree
from torch import nn
from torch.func import functional_call

from safe_core import Layout
from safe_core.adapters.jax import flatness as jax_flatness
from safe_core.adapters.torch import flatness as torch_flatness
from safe_core.adapters.torch.modules import RandomState

RNG = np.random.default_rng(0)
WEIGHTS = {"0": RNG.normal(size=(4, 3)), "2": RNG.normal(size=(2, 4))}
BIASES = {"0": RNG.normal(size=4), "2": RNG.normal(size=2)}
BATCHES = [(RNG.normal(size=(n, 3)), RNG.integers(0, 2, n)) for n in (6, 6)]
SIZE = 4 * 3 + 4 + 2 * 4 + 2


def torch_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.load_state_dict(
        {f"{i}.weight": torch.from_numpy(WEIGHTS[i]) for i in WEIGHTS}
        | {f"{i}.bias": torch.from_numpy(BIASES[i]) for i in BIASES}
    )
    return model


def torch_batches() -> list[Any]:
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in BATCHES]


def torch_surface(model: nn.Module, batches: Any = None, **options: Any) -> Any:
    def loss(batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return torch_flatness.loss_surface(loss, model, batches or torch_batches(), **options)


SKELETON = torch_model()


def torch_functional(params: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(functional_call(SKELETON, params, batch[0]), batch[1])


def jax_params() -> dict[str, Any]:
    return {
        i: {"kernel": jnp.asarray(WEIGHTS[i].T), "bias": jnp.asarray(BIASES[i])} for i in WEIGHTS
    }


def jax_loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    hidden = jnp.tanh(x @ params["0"]["kernel"] + params["0"]["bias"])
    scores = hidden @ params["2"]["kernel"] + params["2"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def jax_surface(params: Any = None, batches: Any = BATCHES, **options: Any) -> Any:
    return jax_flatness.loss_surface(jax_loss, params or jax_params(), batches, **options)


@pytest.fixture(scope="module")
def full_hessian() -> np.ndarray:
    """Of the mean over the batches, in the order of `ravel_pytree`: biases before kernels."""
    flat, unravel = ravel_pytree(jax_params())

    def loss(flat: Any) -> jax.Array:
        return sum(jax_loss(unravel(flat), batch) for batch in BATCHES) / 2

    return np.asarray(jax.jit(jax.hessian(loss))(flat))


def surfaces() -> dict[str, Any]:
    named = {k: p.detach() for k, p in torch_model().named_parameters()}
    return {
        "module": torch_surface(torch_model()),
        "mapping": torch_flatness.loss_surface(torch_functional, named, torch_batches()),
        "jax": jax_surface(),
    }


@pytest.mark.parametrize("kind", ["module", "mapping", "jax"])
def test_eigenvalues_and_trace_are_those_of_the_full_hessian(kind, full_hessian):
    surface = surfaces()[kind]
    found = surface.eigenvalues(k=3, tolerance=1e-10)
    assert found.values == pytest.approx(np.linalg.eigvalsh(full_hessian)[:-4:-1], abs=1e-9)
    estimate = surface.trace(samples=2, sketch=SIZE)
    assert estimate.value == pytest.approx(np.trace(full_hessian), abs=1e-9)


def test_torch_agrees_with_its_own_full_hessian(full_hessian):
    named = {k: p.detach() for k, p in torch_model().named_parameters()}
    hessian = torch.func.jacrev(torch.func.jacrev(torch_functional))
    blocks = [hessian(named, batch) for batch in torch_batches()]
    size = [named[k].numel() for k in named]
    rows = [
        torch.cat([b[i][j].reshape(m, n) for j, n in zip(named, size, strict=True)], 1)
        for b in blocks
        for i, m in zip(named, size, strict=True)
    ]
    full = torch.cat(rows).reshape(2, SIZE, SIZE).mean(0).numpy()
    values = np.linalg.eigvalsh(full)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(full_hessian), atol=1e-12)
    product = torch_surface(torch_model()).loss.hessian_product()
    vectors = [torch.from_numpy(RNG.normal(size=p.shape)) for p in named.values()]
    flat = torch.cat([v.flatten() for v in vectors])
    found = torch.cat([h.flatten() for h in product(vectors)])
    np.testing.assert_allclose(found, torch.from_numpy(full) @ flat, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
def test_frameworks_agree_on_sharpness(steps):
    found = [s.sharpness(0.1, steps=steps) for s in surfaces().values()]
    assert len(found[0].by_batch) == 2
    assert found[0].by_batch[0] != found[0].by_batch[1]
    for other in found[1:]:
        assert other.by_batch == pytest.approx(found[0].by_batch, rel=1e-10)
    assert found[0].worst == max(found[0].by_batch)


def test_frameworks_agree_on_landscapes():
    of_torch, _, of_jax = surfaces().values()
    weights = {i: RNG.normal(size=w.shape) for i, w in WEIGHTS.items()}
    to_torch = {f"{i}.weight": torch.from_numpy(w) for i, w in weights.items()}
    to_torch |= {f"{i}.bias": torch.zeros(b.shape).double() for i, b in BIASES.items()}
    to_jax = {
        i: {"kernel": jnp.asarray(w.T), "bias": jnp.zeros(BIASES[i].shape)}
        for i, w in weights.items()
    }
    lines = [of_torch.landscape([to_torch], points=3), of_jax.landscape([to_jax], points=3)]
    np.testing.assert_allclose(lines[0].values, lines[1].values, rtol=1e-12)
    params = jax_params()
    middle = np.mean([float(jax_loss(params, batch)) for batch in BATCHES])
    assert lines[0].values[1] == pytest.approx(middle, rel=1e-14)


def test_random_directions_have_the_norms_of_the_output_units():
    seen = []

    def of_torch(batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(batch).sum()

    model = torch_model()
    torch_flatness.loss_surface(of_torch, model, [torch_batches()[0][0]]).landscape(points=2)
    for name, x, moved in zip(WEIGHTS, list(model.parameters())[::2], seen[1][::2], strict=True):
        step = (moved - x).detach().norm(dim=1)
        np.testing.assert_allclose(step, np.linalg.norm(WEIGHTS[name], axis=1), rtol=1e-12)
    for x, moved in zip(list(model.parameters())[1::2], seen[1][1::2], strict=True):
        assert torch.equal(x, moved)  # biases stay


def test_jax_reads_the_output_axis_of_a_kernel():
    arrays = jax_surface().loss
    assert arrays.layouts() == [None, Layout((-2,), (-1,))] * 2


def pruned() -> tuple[nn.Sequential, dict[str, Any]]:
    model, params = torch_model(), jax_params()
    for i in WEIGHTS:
        mask = np.abs(WEIGHTS[i]) > 0.7
        with torch.no_grad():
            model.get_submodule(i).weight.mul_(torch.from_numpy(mask))
        params[i]["kernel"] = params[i]["kernel"] * mask.T
    with torch.no_grad():
        model[0].bias[1] = 0  # a zero that is no weight stays a variable
    params["0"]["bias"] = params["0"]["bias"].at[1].set(0)
    return model, params


def test_the_spectrum_on_the_kept_entries():
    model, params = pruned()
    flat, unravel = ravel_pytree(params)
    kept = jax.tree_util.tree_map_with_path(
        lambda path, x: x != 0 if path[-1].key == "kernel" else jnp.ones(x.shape, bool), params
    )
    rows = np.flatnonzero(ravel_pytree(kept)[0])
    assert rows.size < flat.size
    full = jax.jit(jax.hessian(lambda x: jax_loss(unravel(x), BATCHES[0])))(flat)
    expected = np.linalg.eigvalsh(np.asarray(full)[np.ix_(rows, rows)])[-1]
    masked = {i: {"kernel": k["kernel"], "bias": None} for i, k in kept.items()}
    support = {f"{i}.weight": torch.from_numpy(np.array(k["kernel"].T)) for i, k in kept.items()}
    of_torch = [torch_surface(model, torch_batches()[:1], support=s) for s in ("nonzero", support)]
    of_jax = [jax_surface(params, BATCHES[:1], support=s) for s in ("nonzero", masked)]
    for nonzero, given in (of_torch, of_jax):
        found = nonzero.eigenvalues(tolerance=1e-10)
        assert found.values[0] == pytest.approx(expected, rel=1e-9)
        for a, b in zip(nonzero.loss.support(), given.loss.support(), strict=True):
            assert b is None if a is None else bool((a == b).all())
    d = of_torch[0].eigenvalues().vectors[0]["0.weight"]
    assert (d[model[0].weight == 0] == 0).all()


# What measuring leaves behind


def everything(surface: Any) -> None:
    surface.eigenvalues(iterations=3)
    surface.trace(samples=2)
    surface.sharpness(0.1, steps=2)
    surface.landscape(directions=2, points=2)


class Trained(nn.Module):
    """Batch and instance norm, dropout, attention, a frozen weight, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norms = nn.ModuleList(
            [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
        )
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attend(x, x, x, need_weights=False)[0]
        for norm in self.norms:
            x = norm(x)
        return self.frozen(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("batches", [1, 2])
def test_torch_models_are_left_as_they_were(batches):
    torch.manual_seed(0)
    model = Trained()
    with torch.no_grad():  # bits that arithmetic would not restore
        model.frozen.bias[:2] = torch.tensor([-0.0, 1e-42])
    model.unused.grad = gradient = torch.ones(2)
    before = {k: bits(v.clone().numpy()) for k, v in model.state_dict().items()}
    random, flags = RandomState.record(), [m.track_running_stats for m in model.norms]
    held = list(torch.randn(batches, 3, 4, 4))
    torch.set_rng_state(random.cpu)
    surface = torch_flatness.loss_surface(lambda x: model(x).square().mean(), model, held)
    with torch.no_grad():  # a caller's choice that measuring overrides, and restores
        everything(surface)
        assert not torch.is_grad_enabled()
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(bits(value.numpy()), before[key], err_msg=key)
    assert model.unused.grad is gradient
    assert all(p.grad is None for p in model.attend.parameters())
    assert torch.equal(torch.get_rng_state(), random.cpu)
    assert (model.training, [m.track_running_stats for m in model.norms]) == (True, flags)
    vector = surface.eigenvalues(iterations=3).vectors[0]
    assert "frozen.weight" not in vector
    assert vector["unused"].shape == (2,)


def test_parameters_are_restored_after_an_error():
    model, calls = torch_model(), []
    before = [bits(p.detach().clone().numpy()) for p in model.parameters()]

    def loss(batch):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model(batch[0]).square().mean()

    surface = torch_flatness.loss_surface(loss, model, torch_batches()[:1])
    with pytest.raises(RuntimeError, match="out of memory"):
        surface.sharpness(0.1)
    for p, kept in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(bits(p.detach().numpy()), kept)


def test_dropout_draws_the_same_masks_so_that_products_are_symmetric():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
    surface = torch_flatness.loss_surface(
        lambda x: model(x).square().mean(), model, [x for x, _ in torch_batches()]
    )
    found = surface.eigenvalues(tolerance=1e-9)
    assert found.errors[0] <= 1e-8 * found.values[0]


def test_a_mapping_is_not_written_to_and_holds_what_else_the_loss_needs():
    named = {"w": torch.ones(3).double(), "count": torch.tensor(2)}
    surface = torch_flatness.loss_surface(
        lambda p, x: p["count"] * (p["w"] * x).square().sum(), named, [torch.arange(3.0)]
    )
    line = surface.landscape([{"w": torch.ones(3).double()}], points=3)
    np.testing.assert_allclose(line.values, [0, 10, 40])
    assert surface.eigenvalues().values[0] == pytest.approx(16)
    assert torch.equal(named["w"], torch.ones(3).double())
    assert not named["w"].requires_grad


def test_directions_of_ones_own_stay_on_the_support():
    surface = torch_flatness.loss_surface(
        lambda p, x: (p["w"] * x).square().sum(),
        {"w": torch.zeros(2)},
        [torch.tensor([1.0, 10.0])],
        support={"w": torch.tensor([True, False])},
    )
    line = surface.landscape([{"w": torch.ones(2)}], points=3)
    np.testing.assert_array_equal(line.values, [1, 0, 1])


def test_parameters_are_read_when_something_is_measured():
    model = nn.Linear(1, 1, bias=False)
    surface = torch_flatness.loss_surface(lambda x: model(x).pow(4).sum(), model, [torch.ones(1)])
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.weight.fill_(value)
        assert surface.eigenvalues().values[0] == pytest.approx(12 * value**2)


def test_narrow_parameters_and_linear_losses():
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    flat = torch_flatness.loss_surface(lambda p, b: (p["w"] * b).sum(), {"w": x}, [x])
    assert flat.eigenvalues().values == [0.0]
    assert flat.sharpness(4.0).mean == pytest.approx(8.0)
    curved = torch_flatness.loss_surface(lambda p, b: (p["w"] * b).square().sum(), {"w": x}, [x, x])
    assert curved.eigenvalues(k=4).values == pytest.approx([2.0] * 4, rel=1e-2)
    assert curved.eigenvalues().vectors[0]["w"].dtype == torch.float32
    of_jax = jax_flatness.loss_surface(
        lambda p, b: jnp.sum((p["w"] * b) ** 2),
        {"w": jnp.ones((2, 2), "bfloat16")},
        [np.ones((2, 2))],
    )
    (found,) = of_jax.loss.hessian_product()([jnp.full((2, 2), 3, "float32")])
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.full((2, 2), 6))


def test_jax_promotes_nothing_and_leaves_other_leaves_alone(strict_promotion, single_precision):
    params = {"w": jnp.full((2,), 2.0), "count": jnp.asarray(3), "name": "mlp", "key": 1.0}

    def loss(params, batch):
        assert params["name"] == "mlp"
        return params["count"].astype(jnp.float32) * jnp.sum((params["w"] * batch) ** 2)

    surface = jax_flatness.loss_surface(loss, params, [np.asarray([1.0, 2.0], np.float32)])
    assert surface.eigenvalues().values[0] == pytest.approx(24)
    assert surface.eigenvalues().vectors[0]["count"] is None
    assert surface.trace(samples=2).value == pytest.approx(30)
    assert surface.sharpness(1.0, steps=3).worst > 0
    assert surface.landscape([{**params, "w": jnp.ones(2)}], points=3).values[1] == 60
    half = jax_flatness.loss_surface(
        lambda p, _: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2) * jnp.float32(9),
        {"a": jnp.ones(2), "b": jnp.ones(2)},
        [jnp.zeros(())],
        trainable=lambda path, leaf: path == "a",
    )
    assert half.eigenvalues().values[0] == pytest.approx(2)


def test_jax_holds_the_products_of_one_batch_at_a_time(monkeypatch):
    surface = jax_flatness.loss_surface(
        lambda p, b: jnp.sum((p["w"] * b) ** 2), {"w": jnp.ones(997)}, list(np.arange(1.0, 7.0))
    )
    product, alive = surface.loss._product, []

    def counted(*args):
        alive.append(sum(x.shape == (997,) for x in jax.live_arrays()))
        return product(*args)

    monkeypatch.setattr(surface.loss, "_product", counted)
    (found,) = surface.loss.hessian_product()([jnp.ones(997)])
    np.testing.assert_allclose(found, 2 * np.mean(np.arange(1, 7) ** 2))
    assert alive[2:] == [alive[2]] * 4


def surface_of(loss: Any = None, params: Any = None, batches: Any = (0,), **options: Any) -> Any:
    loss = loss or (lambda params, batch: params["w"].square().sum())
    params = {"w": torch.ones(2)} if params is None else params
    return torch_flatness.loss_surface(loss, params, batches, **options)


def jax_surface_of(
    loss: Any = None, params: Any = None, batches: Any = (0,), **options: Any
) -> Any:
    loss = loss or (lambda params, batch: jnp.sum(params["w"] ** 2))
    params = {"w": jnp.ones(2)} if params is None else params
    return jax_flatness.loss_surface(loss, params, batches, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: surface_of(loss=3), TypeError, "loss must be a function, got 3"),
        (lambda: surface_of(params=[1]), TypeError, "params must be a torch.nn.Module or a map"),
        (lambda: surface_of(params={}), ValueError, "params must hold a floating tensor"),
        (lambda: surface_of(params={"w": torch.ones(2) * 1j}), TypeError, "w must be real"),
        (lambda: surface_of(batches=[]), ValueError, "batches must hold at least one"),
        (
            lambda: surface_of(support={"v": 1}),
            ValueError,
            "support must name parameters, w, got 'v'",
        ),
        (lambda: surface_of(support=1), TypeError, "support must be 'nonzero', a mapping or None"),
        (lambda: surface_of(support="nonzero"), ValueError, "no model to find the weights of"),
        (
            lambda: surface_of(lambda p, b: p["w"]).eigenvalues(),
            ValueError,
            r"loss must return a tensor of one entry, got shape \(2,\)",
        ),
        (
            lambda: surface_of(lambda p, b: torch.ones(())).eigenvalues(),
            ValueError,
            "loss must depend on the parameters",
        ),
        (lambda: surface_of().landscape(3), ValueError, "directions must be 1 or 2, got 3"),
        (lambda: surface_of().landscape([{"v": 1}]), ValueError, "direction must be a mapping"),
        (lambda: surface_of().landscape(), ValueError, "layouts must name the filters"),
        (
            lambda: surface_of(params=nn.ConvTranspose2d(2, 2, 1, groups=2)).landscape(),
            ValueError,
            "layout of weight is unknown: pass layout=",
        ),
        (lambda: jax_surface_of(loss=3), TypeError, "loss must be a function, got 3"),
        (lambda: jax_surface_of(params={"w": jnp.arange(2)}), ValueError, "params must hold a fl"),
        (lambda: jax_surface_of(params={"w": jnp.ones(2) * 1j}), TypeError, "w must be real"),
        (lambda: jax_surface_of(batches=[]), ValueError, "batches must hold at least one"),
        (lambda: jax_surface_of(support=[1, 2]), ValueError, "support must have the structure"),
        (lambda: jax_surface_of(support="kept"), ValueError, "support must be 'nonzero', a pyt"),
        (
            lambda: jax_surface_of(lambda p, b: p["w"]).loss.value([jnp.ones(2)]),
            ValueError,
            r"loss must return a real floating scalar, got float64 of shape \(2,\)",
        ),
        (lambda: jax_surface_of().landscape([[1, 2]]), ValueError, "direction must have the str"),
        (
            lambda: jax_surface_of(params={"kernel": jnp.ones((2, 2, 2))}).landscape(),
            ValueError,
            "layout of kernel is unknown: pass layout=",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Sparsities of single tensors: by the Erdos-Renyi-Kernel rule, by name, or with a floor."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_api_compat import array_namespace
from array_backends import Backend, projector
from hypothesis import given
from hypothesis import strategies as st
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import (
    Block,
    ByName,
    Channel,
    Layout,
    Unstructured,
    magnitude,
    project,
    schedules,
    stationarity_gap,
)
from safe_core.adapters import optax as jax_adapter
from safe_core.adapters.torch import SparseOptimizer
from safe_core.constraints import ArrayInfo
from safe_core.constraints.splitting import is_projected
from safe_core.functional import start
from safe_core.patterns import erdos_renyi_kernel
from safe_core.projection import select
from safe_core.reconstruction import block_pattern
from safe_core.solvers import SparseGPT, Wanda

ERK = "erdos_renyi_kernel"
SIZES = st.lists(st.lists(st.integers(0, 12), max_size=4).map(tuple), max_size=6)


def densities(sizes: list[tuple[int, ...]], kept: int) -> list[float]:
    """The rule by bisection on its factor, in floating point."""

    def spread(factor: float) -> list[float]:
        return [min(math.prod(s), factor * sum(s)) if s else 1.0 for s in sizes]

    low, high = 0.0, float(max(math.prod(s) for s in sizes)) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(spread(middle)) < kept else (low, middle)
    return spread(high)


@given(SIZES, st.fractions(0, 1))
def test_the_rule_spreads_exactly_what_it_is_given(
    sizes: list[tuple[int, ...]], share: Fraction
) -> None:
    entries = [math.prod(size) for size in sizes]
    zeros = int(share * sum(n for n, size in zip(entries, sizes, strict=True) if size))
    found = erdos_renyi_kernel(sizes, zeros)
    assert sum(found) == zeros
    assert all(0 <= z <= n for z, n in zip(found, entries, strict=True))
    assert not any(z for z, size in zip(found, sizes, strict=True) if not size)
    if zeros < sum(entries):
        kept = densities(sizes, sum(entries) - zeros)
        for z, n, wanted in zip(found, entries, kept, strict=True):
            assert abs(n - z - wanted) < 1 + 1e-6


def test_the_rule_on_a_network_worked_by_hand() -> None:
    # Sums of axes are 20, 20 and 11, products 100, 100 and 10: of 42 entries to be kept the last
    # would get 42 * 11 / 51 = 9.06, so nothing is capped; with 60 it would get 12.9 of its 10.
    sizes = [(10, 10), (10, 10), (1, 10)]
    assert erdos_renyi_kernel(sizes, 210 - 42) == [84, 83, 1]
    assert erdos_renyi_kernel(sizes, 210 - 60) == [75, 75, 0]


def test_the_rule_leaves_scalars_dense() -> None:
    assert erdos_renyi_kernel([()], 0) == [0]
    assert erdos_renyi_kernel([(), (4, 5), ()], 20) == [0, 20, 0]
    assert erdos_renyi_kernel([(), (0, 3), (5,), (4, 5)], 15) == [0, 0, 1, 14]
    # A vector has the density min(1, c): here c is 1/2 for both, and the matrix is pruned more.
    assert erdos_renyi_kernel([(8,), (8, 8)], 72 - 12) == [4, 56]
    for zeros in (1, 2):
        with pytest.raises(ValueError, match="zeros must be at most the 0 entries of tensors with"):
            erdos_renyi_kernel([(), ()], zeros)


def test_a_scale_beside_a_weight_stays_dense(xp: Backend) -> None:
    arrays = [np.asarray(0.001), np.random.default_rng(0).standard_normal((4, 5)), np.ones((0, 3))]
    found = xp.run(projector(Unstructured(0.9, "tensor", ERK)), arrays).support
    assert bool(found[0])
    assert int((~found[1]).sum()) == 18
    assert xp.run(projector(Unstructured(0.9, "tensor", ERK)), arrays[:1]).support[0]
    stacked = Unstructured(0.5, "tensor", ERK).distributed(
        [(6,), (4, 4)], [Layout(batch_axes=(0,)), None], ["scales", "w"]
    )
    assert stacked == [(Fraction(0),), (Fraction(11, 16),)]


def test_every_backend_keeps_the_largest_of_each_distribution(xp: Backend) -> None:
    random = np.random.default_rng(0)
    arrays = [
        random.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (4, 6, 3, 3), (5,))
    ]
    pattern = Unstructured(0.8, "tensor", ERK)
    found = xp.run(projector(pattern), arrays).support
    zeros = [int((~mask).sum()) for mask in found]
    assert zeros == erdos_renyi_kernel([(6, 8), (4, 6, 3, 3), (5,)], int(0.8 * 269))
    for x, mask in zip(arrays, found, strict=True):
        assert (~mask).sum() == 0 or np.abs(x[mask]).min() >= np.abs(x[~mask]).max()


def test_both_layouts_of_a_weight_have_one_distribution() -> None:
    random = np.random.default_rng(0)
    conv, dense = random.standard_normal((8, 4, 3, 3)), random.standard_normal((10, 32))
    pattern = Unstructured(0.9, "tensor", ERK)
    roles = Layout((-2,), (-1,))
    torch_like = project([conv, dense], pattern).support
    flax_like = project(
        [conv.transpose(2, 3, 1, 0), dense.T], pattern, layout=[roles, roles]
    ).support
    np.testing.assert_array_equal(torch_like[0].transpose(2, 3, 1, 0), flax_like[0])
    np.testing.assert_array_equal(torch_like[1].T, flax_like[1])


def test_axes_of_one_role_count_as_one_and_stacked_tensors_each() -> None:
    heads = Layout(input_axes=(0,), output_axes=(1, 2))
    stacked = Layout(input_axes=(1,), output_axes=(2,), batch_axes=(0,))
    found = Unstructured(0.75, "tensor", ERK).distributed(
        [(6, 2, 4), (3, 6, 8)], [heads, stacked], ["a", "b"]
    )
    assert found == [(Fraction(3, 4),)] * 2
    uneven = Unstructured(0.75, "tensor", ERK).distributed(
        [(6, 2, 4), (3, 10, 20)], [heads, stacked], ["a", "b"]
    )
    zeros = erdos_renyi_kernel([(8, 6), *[(20, 10)] * 3], 486)
    assert uneven == [(Fraction(zeros[0], 48),), (Fraction(sum(zeros[1:]), 600),)]


def test_every_row_has_the_fraction_of_its_tensor() -> None:
    x = np.random.default_rng(0).standard_normal((4, 20))
    pattern = Unstructured(0.5, "row", {"b": 0.9})
    support = project({"a": x, "b": x}, pattern).support
    assert support["a"].sum(1).tolist() == [10] * 4
    assert support["b"].sum(1).tolist() == [2] * 4


@pytest.mark.parametrize("distribution", [ERK, {"a": 0.6}], ids=str)
def test_a_distribution_rises_with_the_sparsity(distribution: Any) -> None:
    rising = Unstructured(schedules.linear_sparsity(0.9, steps=3, every=1), "tensor", distribution)
    shapes = [(10, 10), (20, 10)]
    found = rising.distributed(shapes, [None, None], ["a", "b"])
    final = Unstructured(0.9, "tensor", distribution).distributed(shapes, [None, None], ["a", "b"])
    for stages, (last,) in zip(found, final, strict=True):
        assert stages[0] == 0
        assert list(stages) == sorted(stages)
        assert stages[-1] == last
    if distribution != ERK:
        assert found[0] == (0, Fraction(1, 5), Fraction(2, 5), Fraction(3, 5))


def test_a_certificate_knows_the_distribution() -> None:
    x = {"a": np.asarray([2.0, 1.0, 0.0, 0.0]), "b": np.asarray([0.0, 0.0, 0.0, 3.0])}
    gradient = {name: np.zeros(4) for name in x}
    pattern = Unstructured(0.5, "tensor", {"b": 0.75})
    assert stationarity_gap(x, gradient, 1.0, pattern) == 0
    assert stationarity_gap(x, gradient, 1.0, Unstructured(0.75, "tensor")) != 0


class Network:
    """The same weights in both frameworks, and the distribution by the names there."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)).double()
        self.x, self.y = torch.randn(32, 12).double(), torch.randn(32, 4).double()
        self.params = {
            f"dense{i}": {
                "kernel": jnp.asarray(layer.weight.detach().numpy().T),
                "bias": jnp.asarray(layer.bias.detach().numpy()),
            }
            for i, layer in enumerate((self.model[0], self.model[2]))
        }

    def torch_loss(self) -> torch.Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def jax_loss(self, params: Any) -> Any:
        hidden = jnp.tanh(self.x.numpy() @ params["dense0"]["kernel"] + params["dense0"]["bias"])
        output = hidden @ params["dense1"]["kernel"] + params["dense1"]["bias"]
        return ((output - self.y.numpy()) ** 2).mean()

    def train_torch(self, method: Any, steps: int) -> SparseOptimizer:
        optimizer = SparseOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1), method, model=self.model
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.torch_loss()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return optimizer

    def train_jax(self, method: Any, steps: int) -> Any:
        tx = jax_adapter.sparse_optimizer(optax.sgd(0.1), method)
        params, state = self.params, jax.jit(tx.init)(self.params)
        gradients = jax.grad(self.jax_loss)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(gradients(params), state, params, grad_fn=gradients)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return jax.jit(partial(jax_adapter.finalize, method=method))(params, state)


@short_run
def test_both_frameworks_end_on_the_same_distribution() -> None:
    network = Network()
    method = safe_core.safe(
        Unstructured(0.8, "tensor", ERK), rho=0.05, penalty=0.1, dual_update_interval=2
    )
    in_jax = network.train_jax(method, 6)
    optimizer = network.train_torch(method, 6)
    asked = {row.name: row.asked for row in optimizer.report().tensors}
    optimizer.finalize()
    zeros = []
    for i, layer in enumerate((network.model[0], network.model[2])):
        weight = layer.weight.detach().numpy()
        np.testing.assert_allclose(weight, np.asarray(in_jax[f"dense{i}"]["kernel"]).T, atol=1e-12)
        zeros.append(int((weight == 0).sum()))
    assert zeros == erdos_renyi_kernel([(20, 12), (4, 20)], 256)
    assert zeros[0] > 0.8 * 240  # the larger is the sparser
    assert asked == {"0.weight": 0.8, "2.weight": 0.8}
    optimizer.check_sparsity()


@short_run
def test_a_distribution_by_name_goes_through_reports_and_checkpoints() -> None:
    method = safe_core.admm(
        Unstructured(0.5, "tensor", {"2.weight": 0.75}), penalty=0.1, dual_update_interval=2
    )
    network = Network()
    optimizer = network.train_torch(method, 3)
    report = {row.name: (row.asked, row.achieved) for row in optimizer.report().tensors}
    assert report == {"0.weight": (0.5, 0.5), "2.weight": (0.75, 0.75)}
    again = SparseOptimizer(
        torch.optim.SGD(network.model.parameters(), lr=0.1), method, model=network.model
    )
    again.load_state_dict(optimizer.state_dict())
    other = SparseOptimizer(
        torch.optim.SGD(network.model.parameters(), lr=0.1),
        safe_core.admm(Unstructured(0.5, "tensor"), penalty=0.1, dual_update_interval=2),
        model=network.model,
    )
    with pytest.raises(ValueError, match="distribution"):
        other.load_state_dict(optimizer.state_dict())
    again.finalize()
    counts = [int((layer.weight == 0).sum()) for layer in (network.model[0], network.model[2])]
    assert counts == [120, 60]


def test_a_floor_rises_with_what_all_tensors_keep(xp: Backend) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(10, 10)), 1e-3 * rng.normal(size=(20, 10))]
    pattern = Unstructured(schedules.linear_sparsity(0.9, steps=30, every=10), floor=0.5)

    def kept(arrays: Any, step: Any) -> list[int]:
        apart: dict[str, Any] = {"importance": [None] * 2, "layouts": [None] * 2}
        found = select(arrays, pattern, names=["a", "b"], step=step, **apart)
        return [array_namespace(mask).count_nonzero(mask) for mask in found]

    seen = set()
    for step in (0, 10, 20, None):
        given = step if step is None else xp.asarray(np.asarray(step)) if xp.traces else step
        a, b = (int(n) for n in xp.call(kept, [xp.asarray(x) for x in arrays], given))
        zeros = pattern.fractions()[pattern.stage(step)]
        seen.add(zeros)
        assert a + b == 300 - int(300 * zeros), step
        assert b == max(int((1 - zeros) / 2 * 200), 300 - int(300 * zeros) - 100)
    assert len(seen) > 2


def test_a_floor_keeps_a_layer_with_small_weights_alive() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x[:, :1] * x[:, 1:2]).detach()

    def trained(floor: float) -> nn.Sequential:
        torch.manual_seed(1)
        first, second, last = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        method = safe_core.safe(Unstructured(0.99, floor=floor), steps=60)
        names = ("0.weight", "2.weight")
        optimizer = SparseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            method,
            model=model,
            where=list(names),
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            return loss

        for _ in range(60):
            optimizer.step(closure)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", safe_core.FinalizeWarning)
            optimizer.finalize()
        optimizer.check_sparsity()
        return model

    assert not trained(0.0)[2].weight.any()
    assert int((trained(0.5)[2].weight != 0).sum()) >= int(0.5 * 0.01 * 64 * 64)


def test_a_floor_counts_infinite_entries_as_any_other(xp: Backend) -> None:
    arrays = [np.asarray([np.inf, -np.inf, np.inf, 1.0]), np.asarray([1.0, 2.0, 3.0, 4.0])]
    found = xp.run(projector(Unstructured(0.625, floor=1.0)), arrays)
    assert [mask.tolist() for mask in found.support] == [
        [True, True, False, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(0.9, floor=0.5),
        Block((1, 2), 0.8, "global", floor=0.3),
        Channel(0.75, "global", floor=1.0),
    ],
    ids=str,
)
def test_supports_with_a_floor_are_those_of_the_pattern(pattern: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(8, 6)), 1e-3 * rng.normal(size=(4, 10))]
    info = ArrayInfo(("a", "b"), (Layout((1,), (0,)),) * 2)
    support = project(arrays, pattern).support
    assert support[1].any()
    assert is_projected(support, pattern, info)
    emptied = [support[0], np.zeros_like(support[1])]
    assert not is_projected(emptied, pattern, info)


def test_a_mapping_knows_that_a_floor_counts_in_tensors() -> None:
    assert not ByName({"a": 0.5}).counts_in_tensors
    assert ByName({"a": Unstructured(0.5, floor=0.2)}).counts_in_tensors
    assert ByName({"a": 0.5}, default="2:4").counts_in_tensors


def test_a_floor_shows_where_it_is_set() -> None:
    assert "floor" not in repr(Unstructured(0.9))
    pattern = Block((1, 4), 0.9, "global", floor=0.25)
    assert eval(repr(pattern)) == pattern
    assert pattern.describe() == "0.9 of Block, scope global, floor 0.25"


X = np.ones((4, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Unstructured(0.5, "global", ERK),
            ValueError,
            "distribution must be None in scope 'global', where tensors compete, got 'erdos_renyi",
        ),
        (
            lambda: Unstructured(0.5, "tensor", floor=0.1),
            ValueError,
            "floor must be 0 unless scope is 'global', where tensors compete, got 0.1",
        ),
        (
            lambda: Block((1, 4), 0.5, "global", floor=1.5),
            ValueError,
            r"floor must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: Channel(0.5, "global", floor="much"),
            TypeError,
            "floor must be a Python number, got 'much'",
        ),
        (
            lambda: Unstructured(0.5, "tensor", "erk"),
            ValueError,
            "distribution must be one of None, 'erdos_renyi_kernel', got 'erk'",
        ),
        (
            lambda: Unstructured(0.5, "tensor", 0.3),
            TypeError,
            "distribution must be None, 'erdos_renyi_kernel' or a mapping of names to sparsities",
        ),
        (
            lambda: Unstructured(0.5, "tensor", {"a": 1.5}),
            ValueError,
            r"distribution of a must be a fraction in \[0, 1\)",
        ),
        (
            lambda: erdos_renyi_kernel([(3, 3)], 10),
            ValueError,
            "zeros must be at most the 9 entries of tensors with an axis",
        ),
        (lambda: erdos_renyi_kernel([(3, 3)], -1), ValueError, "zeros must be at least 0, got -1"),
        (
            lambda: project({"a": X}, Unstructured(0.5, "tensor", {"b": 0.1})),
            ValueError,
            r"distribution must name sparse tensors, arrays\['a'\], got arrays\['b'\]",
        ),
        (
            lambda: project([X], Unstructured(0.5, "tensor", {"b": 0.1})),
            TypeError,
            "arrays must be a mapping for a distribution by name, got <class 'list'>",
        ),
        (
            lambda: Wanda()(X, X, Unstructured(0.5, "tensor", ERK)),
            ValueError,
            "sparsity must have no distribution for Wanda, which sees one layer",
        ),
        (
            lambda: SparseGPT()(X, X, Unstructured(0.5, "tensor", ERK)),
            ValueError,
            "sparsity must have no distribution for SparseGPT",
        ),
        (
            lambda: block_pattern(Unstructured(0.5, "tensor", ERK)),
            ValueError,
            "sparsity must not compare entries of different weights, nor distribute zeros",
        ),
    ],
)
def test_a_wrong_distribution_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("by_name", [False, True])
def test_an_unknown_name_is_found_at_the_start(by_name: bool) -> None:
    # Magnitude pruning projects only at the end, so a late error would lose the whole training.
    pattern: Any = Unstructured(0.5, "tensor", {"b": 0.1, "typo": 0.2})
    if by_name:
        pattern = ByName({"a": 0.5}, default=pattern)
    info = ArrayInfo(("a", "b"), (None, None))
    with pytest.raises(ValueError, match=r"must name sparse tensors, .*b, got typo"):
        start(magnitude(pattern), [X, X], [0, 1], info)


def test_patterns_by_name_may_share_a_distribution() -> None:
    shared = {"a": 0.25, "b": 0.75}
    own, default = (Unstructured(s, "tensor", shared) for s in (0.5, 0.9))
    pattern = ByName({"a": own, "c": own}, default=default)
    found = project({"a": X, "b": X, "c": X}, pattern).support
    assert {name: int((~mask).sum()) for name, mask in found.items()} == {"a": 4, "b": 12, "c": 8}
    # The default's distribution names "a", which has a pattern of its own and would not follow it.
    with pytest.raises(ValueError, match=r"distribution must name sparse tensors, .*got arrays.*a"):
        project({"a": X, "b": X}, ByName({"a": 0.5}, default=default))

"""The recipe for a block, and the order in which it sees samples."""

from __future__ import annotations

from typing import Any

import pytest

import safe_core
from safe_core import Pull
from safe_core.patterns import Unstructured
from safe_core.reconstruction import (
    Reconstruction,
    batches_at_random,
    batches_in_order,
    block_pattern,
)
from safe_core.solvers import ALPS, Wanda, named_solver

HALF = Unstructured(0.5, scope="tensor")
GROUPS = [[0, 2, 4, 6, 8], [1, 3, 5]]


def test_batches_are_of_one_group_and_hold_every_sample_once() -> None:
    assert batches_in_order(GROUPS, 2) == [[0, 2], [4, 6], [8], [1, 3], [5]]
    drawn = batches_at_random(GROUPS, 2, seed=0)
    assert sorted(map(len, drawn)) == [1, 1, 2, 2, 2]
    assert sorted(sum(drawn, [])) == [0, 1, 2, 3, 4, 5, 6, 8]  # noqa: RUF017
    assert all({k % 2 for k in batch} in ({0}, {1}) for batch in drawn)


def test_the_order_follows_from_seed_block_and_epoch_alone() -> None:
    def order(**given: int) -> list[list[int]]:
        return batches_at_random([range(32)], 8, **{"seed": 0, "block": 0, "epoch": 0, **given})

    orders = [order(), order(seed=1), order(block=1), order(epoch=1), order(seed=1, epoch=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert orders == [
        order(),
        order(seed=1),
        order(block=1),
        order(epoch=1),
        order(seed=1, epoch=1),
    ]


def test_a_pattern_over_several_blocks_is_refused() -> None:
    assert block_pattern(0.5) == Unstructured(0.5, scope="tensor")
    with pytest.raises(ValueError, match=r"sparsity must not compare .* got Unstructured"):
        block_pattern(Unstructured(0.5, scope="global"))


@pytest.mark.parametrize(
    ("betas", "error"), [(0.9, TypeError), ((0.9,), ValueError), ((0.9, 1.0), ValueError)]
)
def test_betas_are_a_pair_below_one(betas: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"betas must be .* got"):
        Reconstruction(betas=betas)


def test_by_default_a_block_starts_at_the_solution_of_alps() -> None:
    recipe = Reconstruction(importance="wanda")
    assert recipe.initial == ALPS()
    method = recipe.bound(HALF, 480)
    assert isinstance(method.constraint, Pull)
    assert method.constraint == safe_core.admm(0.5, steps=480).constraint
    assert method.sparsity == HALF  # it does not rise
    assert not method.plan().perturbs


def test_a_dense_start_lets_the_sparsity_rise() -> None:
    assert Reconstruction(start="dense").initial is None
    method = Reconstruction(start="dense").bound(HALF, 480)
    assert method == safe_core.admm(HALF, steps=480)
    assert method.sparsity.schedule is not None


@pytest.mark.parametrize(("name", "importance"), [("safe", None), ("safe+", "wanda")])
def test_the_settings_of_the_paper_have_a_name(name: str, importance: Any) -> None:
    recipe: Any = named_solver(f"{name}-published")
    assert recipe == Reconstruction(published=True, importance=importance)
    wanted = safe_core.safe(HALF, rho=2e-4, penalty=1e-3, dual_update_interval=32)
    assert recipe.bound(HALF, 480) == recipe.bound(HALF, 9) == wanted
    assert recipe.initial is None
    assert recipe.peak(3.0) == 2e-4
    changed = Reconstruction(published=True, penalty=0.5)
    assert changed.bound(HALF, 9) == safe_core.safe(HALF, rho=2e-4, penalty=0.5)


def test_each_number_that_is_given_replaces_its_derivation() -> None:
    plain = Reconstruction().bound(HALF, 480)
    one = Reconstruction(dual_update_interval=7).bound(HALF, 480)
    assert one.constraint.update_interval == 7
    assert one.perturbation is plain.perturbation is None
    radius = Reconstruction(rho=0.1).bound(HALF, 480)
    assert radius.perturbation == safe_core.SAM(0.1)
    assert radius.constraint == plain.constraint
    penalty = Reconstruction(penalty=0.1).bound(HALF, 480).constraint
    assert penalty == safe_core.admm(0.5, steps=480, penalty=0.1).constraint
    assert penalty.update_interval == 24
    assert Reconstruction(learning_rate=0.3).peak(2.0) == 0.3
    assert Reconstruction().peak(2.0) == 0.02


def test_a_start_is_a_solver_of_layers_by_name_or_value() -> None:
    assert Reconstruction(start="wanda").initial == Reconstruction(start=Wanda()).initial == Wanda()
    assert Reconstruction(start="wanda").needs == "squares"
    assert Reconstruction(start="magnitude").needs == "nothing"
    assert Reconstruction(start="magnitude", importance="wanda").needs == "squares"
    # A method that is given is trained as it is, from the dense weights.
    assert Reconstruction(safe_core.admm(0.5)).initial is None
    assert Reconstruction(safe_core.admm(0.5), start="alps").initial == ALPS()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"start": "alp"}, ValueError, r"start must be .*'dense', 'alps'.* got 'alp'"),
        ({"start": "safe"}, ValueError, r"start must be .* got 'safe'"),
        ({"start": Reconstruction()}, TypeError, r"start must be 'dense' or a solver .* got Recon"),
        (
            {"method": safe_core.safe(0.5), "rho": 0.0},
            ValueError,
            r"rho must be left out if a method is given, .* got 0\.0",
        ),
        (
            {"method": safe_core.safe(0.5), "published": True},
            ValueError,
            r"published must be left out if a method is given, .* got True",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Reconstruction(**given)

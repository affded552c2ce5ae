"""`where=` takes a function or names, and says which biases a function makes sparse."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def wrapped(sparsity=0.5, **options):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return SparseOptimizer(base, safe_core.admm(sparsity), model=model, **options)


def silent(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return list(wrapped(**options).sparse_parameters())


def test_a_function_that_chooses_biases_beside_weights_is_told_which():
    message = r"0\.bias, 2\.bias\. To leave them out, .*lambda name, p: p\.ndim > 1 and"
    with pytest.warns(UserWarning, match=message) as seen:
        wrapped(where=lambda name, p: name != "2.weight")
    assert seen[0].filename == __file__


def test_deliberate_choices_of_biases_are_silent():
    assert silent(where=lambda name, p: "bias" in name) == ["0.bias", "2.bias"]
    assert silent(where=["0.weight", "0.bias"]) == ["0.weight", "0.bias"]
    channels = {"0.bias": safe_core.Layout(output_axes=(0,))}
    chosen = ("0.weight", "0.bias")
    given = silent(where=lambda name, p: name in chosen, layout=channels)
    assert given == ["0.weight", "0.bias"]


def test_names_choose_exactly():
    optimizer = wrapped(where=("2.weight",))
    assert list(optimizer.sparse_parameters()) == ["2.weight"]
    assert [w.reason for w in optimizer.coverage().dense] == ["where= does not list it"]
    with pytest.raises(
        ValueError, match=r"names of parameters, such as 0\.weight, .*got '1\.weight'"
    ):
        wrapped(where=["1.weight"])
    with pytest.raises(ValueError, match=r"where must name at least one parameter, got \[\]"):
        wrapped(where=[])
    with pytest.raises(ValueError, match=r"where= selects none of the 4 that it holds: 0\.weight"):
        wrapped(where=lambda name, p: False)


def test_a_frozen_weight_that_where_selects_is_said_to_need_gradients():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].weight.requires_grad_(False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(safe_core.DenseWeightWarning, match="To make them sparse, set requires_grad"):
        SparseOptimizer(base, safe_core.admm(0.5), model=model, where=["0.weight", "1.weight"])


@pytest.mark.parametrize("pattern", [safe_core.Channel(0.5), safe_core.Block((2, 2), 0.5), "2:4"])
def test_a_pattern_of_two_roles_says_to_leave_a_bias_out(pattern):
    with pytest.raises(ValueError, match=r"^0\.bias has one axis, .*leave it out with where=$"):
        wrapped(pattern, where=lambda name, p: name != "2.weight")


def test_a_group_added_later_is_warned_of_too():
    optimizer = wrapped(where=lambda name, p: p.ndim > 1 or name.startswith("param"))
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))]
    with pytest.warns(UserWarning, match=r"sparse, as a bias is: param_groups\[1\]\[0\]\."):
        optimizer.add_param_group({"params": params})

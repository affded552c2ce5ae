"""`where=` takes a function or paths, and says which biases a function makes sparse."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import safe_core
from safe_core.adapters.optax import coverage, fixed_support, sparse_optimizer

LAYER = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
PARAMS = {"a": LAYER, "b": LAYER}
NOT_LAST = lambda path, leaf: path != "b/kernel"  # noqa: E731


def support(where: Any, params: Any = PARAMS, method: Any = None) -> Any:
    tx = sparse_optimizer(optax.sgd(0.1), method or safe_core.admm(0.5), where=where)
    return tx.init(params).support


def names(tree: Any) -> list[str]:
    return [
        f"{layer}/{key}"
        for layer in ("a", "b")
        for key, found in tree[layer].items()
        if not isinstance(found, optax.MaskedNode)
    ]


def test_a_function_that_chooses_biases_beside_weights_is_told_which() -> None:
    message = r"a/bias, b/bias\. To leave them out, .*lambda path, leaf: leaf\.ndim > 1 and"
    with pytest.warns(UserWarning, match=message):
        support(NOT_LAST)
    with pytest.warns(UserWarning, match=message):
        fixed_support(optax.sgd(0.1), where=NOT_LAST).init(PARAMS)


def test_deliberate_choices_of_biases_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(support(lambda path, leaf: "bias" in path)) == ["a/bias", "b/bias"]
        assert names(support(["a/bias", "a/kernel"])) == ["a/bias", "a/kernel"]
        tree = {"a": {"kernel": True, "bias": True}, "b": {"kernel": False, "bias": False}}
        assert names(support(tree)) == ["a/bias", "a/kernel"]


def test_paths_choose_exactly() -> None:
    found = coverage(PARAMS, where=["a/kernel"])
    assert [w.name for w in found.sparse] == ["a/kernel"]
    assert [w.reason for w in found.dense] == ["where does not list it"]
    assert names(support(["a/kernel"], {"params": PARAMS})["params"]) == ["a/kernel"]
    with pytest.raises(ValueError, match=r"parameters, such as a/bias, .*got 'c/kernel'"):
        support(["c/kernel"])
    with pytest.raises(TypeError, match=r"^where must be a list of paths, .*pass \['a/kernel'\]"):
        support("a/kernel")


def test_a_pattern_of_two_roles_says_to_leave_a_bias_out() -> None:
    with pytest.raises(ValueError, match=r"^a/bias has one axis, .*leave it out with where=\n"):
        support(NOT_LAST, method=safe_core.admm(safe_core.Channel(0.5)))

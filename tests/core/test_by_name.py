"""A pattern by name prunes each array as its own pattern alone would."""

from __future__ import annotations

import numpy as np
import pytest

import safe_core
from safe_core import NM, Block, ByName, Channel, Unstructured, project
from safe_core.patterns import as_pattern

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(8, 8)),
    "b": RNG.normal(size=(4, 16)),
    "c": RNG.normal(size=(6, 8)),
    "d": RNG.normal(size=(6, 8)),
}


def test_each_array_gets_its_own_pattern(xp):
    arrays = [xp.asarray(x.astype("f4")) for x in ARRAYS.values()]
    pattern = ByName({"a": "2:4", "b": Channel(0.5), "c": 0.75}, default=Block((1, 4), 0.5))
    names = list(ARRAYS)

    def run(arrays):
        return project(dict(zip(names, arrays, strict=True)), pattern).support

    found = xp.run(lambda arrays, importance: list(run(arrays).values()), arrays, None)
    for name, x, mask in zip(names, arrays, found, strict=True):
        alone = project(x, pattern.of(name)).support
        assert np.array_equal(np.asarray(mask), np.asarray(alone)), name


def test_arrays_of_one_global_pattern_compete_with_one_another_only():
    both = {name: ARRAYS[name] for name in "cd"}
    pattern = ByName({"a": 0.25, "b": "2:4"}, default=Unstructured(0.9))
    found = project(ARRAYS, pattern).support
    alone = project(both, 0.9).support
    assert all(np.array_equal(found[name], alone[name]) for name in "cd")
    assert (~found["a"]).sum() == 16


def test_a_mapping_is_a_pattern_by_name():
    assert as_pattern({"a": "2:4", "b": 0.5}) == ByName({"a": NM(2, 4), "b": Unstructured(0.5)})
    method = safe_core.safe({"a": "2:4"}, rho=0.1, penalty=0.1)
    assert hash(method) == hash(safe_core.safe({"a": "2:4"}, rho=0.1, penalty=0.1))
    assert method.sparsity.describe() == "2:4 by name"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 0.5}, "name every sparse array or have a default, got none for arrays\\['b'\\]"),
        (ByName({"e": 0.5}, default=0.5), "sparsity must name sparse arrays.*got arrays\\['e'\\]"),
        ({"a": "24"}, "patterns of 'a': sparsity must be a number"),
        ({}, "patterns must name at least one array, got {}"),
        (
            {"a": ByName({"b": 0.5})},
            "patterns of .a. must not be a pattern by name itself, got ByName",
        ),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        project(ARRAYS, given)

"""Notes of a LiteRT report give the one cause for which a layer is computed dense."""

from __future__ import annotations

from typing import Any

import numpy as np

from safe_core._synthetic import synthetic_weight
from safe_core.litert.build import Builder
from safe_core.litert.candidates import built, kernels
from safe_core.litert.notes import notes


def linear(weight: np.ndarray[Any, Any], name: str, rows: int = 1) -> Builder:
    graph = Builder()
    inputs = graph.input("x", (rows, weight.shape[1]))
    graph.outputs = [graph.linear(inputs, graph.constant(weight))]
    graph.operations[0].source = name
    return graph


def test_each_cause_of_a_dense_layer_is_told_alone() -> None:
    blocked = synthetic_weight((64, 64), (1, 16), 0.62, 0)
    layers = []
    for name, weight in {
        "few": blocked,
        "scattered": synthetic_weight((64, 64), (1, 1), 0.7, 1),
        "both": synthetic_weight((64, 64), (1, 1), 0.6, 2),
        "uneven": synthetic_weight((64, 30), (1, 1), 0.9, 3),
    }.items():
        graph = linear(weight, name)
        assert kernels(graph, "float32", always=False) == {}
        layers += built(graph, {}, None).layers
    few, scattered, both, uneven = notes(layers, "float32", {"this file": 1.0}, "")
    assert few.startswith("'few' (62% zeros) is computed dense, since skipping blocks of 1x4 is")
    assert "seldom faster with fewer than 65% zeros: zeros make the file smaller (" in few
    assert few.endswith('Raise the sparsity, or pass compute="sparse" to skip them all the same.')
    assert "since the zeros are not in blocks of 1x4: zeros" in scattered
    assert scattered.endswith("Train with Block((1, 4), ...) for both.")
    assert both.endswith("Train with Block((1, 4), ...) and at least 65% zeros for both.")
    assert "since 4 does not divide the number of inputs, 30: zeros" in uneven
    assert "Train" not in few + uneven
    (asked,) = notes(layers, "float32", {"this file": 1.0}, "", compute="dense")
    assert 'since compute="dense" asks for it' in asked
    assert kernels(linear(blocked, "few"), "float32", always=True)  # as the note says


def test_blocks_that_are_zero_by_chance_are_no_blocks() -> None:
    graph = linear(synthetic_weight((64, 64), (1, 1), 0.965, 0), "scattered", rows=64)
    assert kernels(graph, "float32", always=False) == {}
    layers = built(graph, {}, None).layers
    assert layers[0].zero_blocks > layers[0].needed_zeros
    (note,) = notes(layers, "float32", {"this file": 1.0}, "")
    assert "since the zeros are not in blocks of 1x4: zeros" in note
    assert note.endswith("Train with Block((1, 4), ...) for both.")

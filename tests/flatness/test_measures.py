"""Curvature, sharpness and landscapes of losses whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from array_backends import Backend

from safe_core import Layout
from safe_core.flatness import (
    Landscape,
    Sharpness,
    eigenvalues,
    filter_direction,
    landscape,
    sharpness,
    trace,
)
from safe_core.flatness.figures import plot_contours, plot_lines, save
from safe_core.flatness.vectors import Coordinates

OUTPUT_INPUT = Layout((1,), (0,))
SHAPES = ((2, 3), (4,))


@pytest.fixture(params=[b for b in Backend if not b.traces], ids=lambda backend: backend.value)
def library(request: pytest.FixtureRequest) -> Backend:
    """Every library, eagerly: the length of an iteration depends on values."""
    return request.param


def symmetric(spectrum: Any, seed: int = 0) -> np.ndarray:
    """A dense matrix with given eigenvalues."""
    n = len(spectrum)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (q * np.asarray(spectrum, float)) @ q.T


def operator(library: Backend, matrix: np.ndarray, shapes: Any = SHAPES) -> tuple[Any, list[Any]]:
    """``v -> matrix v`` on arrays of some shapes, and zeros of these shapes."""
    h = library.asarray(matrix)
    arrays = [library.asarray(np.zeros(shape, matrix.dtype)) for shape in shapes]

    def product(vectors: list[Any]) -> list[Any]:
        xp = array_namespace(*vectors)
        flat = h @ xp.concat([xp.reshape(v, (-1,)) for v in vectors])
        first = math.prod(shapes[0])
        parts = [flat] if len(shapes) == 1 else [flat[:first], flat[first:]]
        return [xp.reshape(p, shape) for p, shape in zip(parts, shapes, strict=True)]

    return product, arrays


INDEFINITE = [9.0, 4.0, 4.0, 1.0, 0.5, 0.0, 0.0, -2.0, -3.0, -11.0]


@pytest.mark.parametrize(
    ("which", "expected"),
    [("largest", [9, 4, 4]), ("smallest", [-11, -3, -2]), ("magnitude", [-11, 9, 4])],
)
def test_eigenvalues_of_an_indefinite_matrix(library, which, expected):
    product, arrays = operator(library, symmetric(INDEFINITE))
    found = eigenvalues(product, arrays, 3, which=which, tolerance=1e-12)
    assert found.values == pytest.approx(expected, abs=1e-9)
    for value, y in zip(found.values, found.vectors, strict=True):
        flat = np.concatenate([library.to_numpy(part).ravel() for part in y])
        assert [part.shape for part in y] == list(SHAPES)
        assert np.linalg.norm(flat) == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(symmetric(INDEFINITE) @ flat, value * flat, atol=1e-9)


@pytest.mark.parametrize("spectrum", [[0.0] * 5, [1.0] * 5, [2.0, 0, 0, 0, 0], [-3.0] * 4 + [5]])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_eigenvalues_that_repeat_are_found_as_often(spectrum, k):
    product, arrays = operator(Backend.NUMPY, symmetric(spectrum), ((5,),))
    found = eigenvalues(product, arrays, k)
    assert found.values == pytest.approx(sorted(spectrum, reverse=True)[:k], abs=1e-12)


def test_least_squares_with_several_outputs_repeats_each_eigenvalue():
    inputs = np.random.default_rng(1).normal(size=(50, 8))
    gram = inputs.T @ inputs / 50

    def product(vectors):
        return [gram @ vectors[0]]

    found = eigenvalues(product, [np.zeros((8, 3))], 4)
    top, second = np.linalg.eigvalsh(gram)[[-1, -2]]
    assert found.values == pytest.approx([top, top, top, second], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("iterations", [4, 8, 30])
def test_errors_bound_the_error_and_shrink(dtype, iterations):
    spectrum = 1 / np.arange(1.0, 201.0)
    product, arrays = operator(Backend.NUMPY, symmetric(spectrum).astype(dtype), ((200,),))
    found = eigenvalues(product, arrays, 2, iterations=iterations, tolerance=0)
    rounding = 10 * np.finfo(dtype).eps
    for value, error in zip(found.values, found.errors, strict=True):
        assert np.abs(spectrum - value).min() <= error + rounding
        assert value <= 1 + rounding  # eigenvalues are approached from within
    assert found.products == iterations + 2
    assert max(found.errors) < {4: 0.5, 8: 0.2, 30: 1e-2}[iterations]


def test_iteration_stops_at_its_tolerance():
    product, arrays = operator(Backend.NUMPY, symmetric(2.0 ** -np.arange(60)), ((60,),))
    rough, fine = (eigenvalues(product, arrays, tolerance=t) for t in (1e-2, 1e-8))
    assert rough.products < fine.products < 20
    assert fine.errors[0] <= 1e-8 < rough.errors[0] <= 1e-2
    assert fine.values[0] == pytest.approx(1, abs=1e-14)


def test_no_more_products_than_entries():
    found = eigenvalues(identity, [np.zeros(3)], iterations=10**7, tolerance=0)
    assert (found.values, found.products) == ([pytest.approx(1)], 2)
    diagonal = np.asarray([3.0, 2.0, 1.0])
    found = eigenvalues(lambda v: [diagonal * v[0]], [diagonal], iterations=10**7, tolerance=0)
    assert found.products == 4


def test_a_support_gives_the_spectrum_of_a_submatrix(library):
    matrix = symmetric(INDEFINITE)
    kept = np.asarray([1, 0, 1, 1, 0, 1], bool).reshape(2, 3)
    rows = np.append(np.flatnonzero(kept), range(6, 10))
    product, arrays = operator(library, matrix)
    support = [library.asarray(kept), None]
    found = eigenvalues(product, arrays, 8, tolerance=1e-12, support=support)
    inside = matrix[np.ix_(rows, rows)]
    assert found.values == pytest.approx(np.linalg.eigvalsh(inside)[::-1], abs=1e-9)
    assert (library.to_numpy(found.vectors[0][0])[~kept] == 0).all()
    estimate = trace(product, arrays, 2, sketch=8, support=support)
    assert estimate.value == pytest.approx(np.trace(inside), abs=1e-9)


def test_libraries_draw_the_same_vectors(library):
    arrays = [np.zeros(shape) for shape in SHAPES]
    coordinates, numpy = (
        Coordinates.of([library.asarray(x) for x in arrays]),
        Coordinates.of(arrays),
    )
    for seed in range(5):
        signs, normal = coordinates.rademacher(seed, 2), coordinates.normal(seed, 2)
        np.testing.assert_array_equal(library.to_numpy(signs), numpy.rademacher(seed, 2))
        np.testing.assert_allclose(library.to_numpy(normal), numpy.normal(seed, 2), rtol=1e-12)


def test_draws_are_random():
    coordinates = Coordinates.of([np.zeros(100_000)])
    normal = [coordinates.normal(seed, index) for seed, index in ((0, 0), (0, 1), (1, 0))]
    signs = [coordinates.rademacher(seed, index) for seed, index in ((0, 0), (0, 1), (1, 0))]
    for drawn in (normal, signs):
        # Means, variances and correlations, of neighbours too, within five deviations.
        rows = np.stack([*drawn, *(np.roll(v, 1) for v in drawn)])
        np.testing.assert_allclose(rows @ rows.T / 1e5, np.eye(6), atol=5 * 1.5 / math.sqrt(1e5))
        assert np.abs(rows.mean(1)).max() < 5 / math.sqrt(1e5)
    quantiles = np.quantile(normal[0], [0.025, 0.16, 0.5, 0.84, 0.975])
    np.testing.assert_allclose(quantiles, [-1.96, -0.994, 0, 0.994, 1.96], atol=0.03)


def test_standard_errors_of_the_trace_cover_the_truth():
    matrix = symmetric(INDEFINITE)
    product, arrays = operator(Backend.NUMPY, matrix)
    found = [trace(product, arrays, 40, seed=seed) for seed in range(100)]
    scores = [(t.value - matrix.trace()) / t.standard_error for t in found]
    assert 0.8 < np.std(scores) < 1.25
    assert np.mean(np.abs(scores) < 2) > 0.88
    assert found[0].value == pytest.approx(np.mean(found[0].samples))


def test_a_sketch_takes_out_what_stands_out():
    product, arrays = operator(Backend.NUMPY, symmetric([100, 50, *[0.1] * 8]))
    plain, sketched = trace(product, arrays, 20), trace(product, arrays, 20, sketch=3)
    assert sketched.standard_error < plain.standard_error / 10
    assert sketched.value == pytest.approx(150.8, abs=4 * sketched.standard_error + 1e-9)
    assert trace(product, arrays, 2, sketch=20).standard_error < 1e-9  # all is spanned


def bowl(matrix: np.ndarray, library: Backend = Backend.NUMPY) -> Any:
    """Value and gradient of ``x . matrix x / 2``."""
    h = library.asarray(matrix)

    def value_and_gradient(arrays: list[Any]) -> tuple[Any, list[Any]]:
        gradient = h @ arrays[0]
        return array_namespace(gradient).sum(arrays[0] * gradient) / 2, [gradient]

    return value_and_gradient


def test_one_step_is_the_perturbation_of_sam(library):
    matrix, x = symmetric(INDEFINITE), np.linspace(-1, 2, 10)
    found = sharpness(bowl(matrix, library), [library.asarray(x)], 0.3)
    moved = x + 0.3 * matrix @ x / np.linalg.norm(matrix @ x)
    assert found == pytest.approx((moved @ matrix @ moved - x @ matrix @ x) / 2, rel=1e-12)


@pytest.mark.parametrize("x", [np.zeros(3), np.asarray([0.1, -0.3, 0.2])], ids=["minimum", "slope"])
def test_ascent_finds_the_worst_point_of_the_ball(x):
    matrix, rho = symmetric([5.0, 3.0, -2.0]), 0.5
    found = [sharpness(bowl(matrix), [x], rho, steps=steps) for steps in (1, 2, 5, 100)]
    assert found == sorted(found)
    grid = np.random.default_rng(0).normal(size=(20_000, 3))
    grid = x + rho * grid / np.linalg.norm(grid, axis=1, keepdims=True)
    best = (np.einsum("ni,ij,nj->n", grid, matrix, grid).max() - x @ matrix @ x) / 2
    assert best <= found[-1] + 1e-9
    assert found[-1] == pytest.approx(best, rel=2e-3)


def test_steps_are_those_of_projected_ascent():
    matrix, x, rho = symmetric([5.0, 3.0, -2.0]), np.asarray([0.1, -0.3, 0.2]), 0.5
    e, rises = np.zeros(3), []
    for t in (1, 2, 3):
        g = matrix @ (x + e)
        e = e + rho / np.sqrt(t) * g / np.linalg.norm(g)
        e = e * min(1, rho / np.linalg.norm(e))
        rises.append(((x + e) @ matrix @ (x + e) - x @ matrix @ x) / 2)
    assert sharpness(bowl(matrix), [x], rho, steps=3) == pytest.approx(max(rises), rel=1e-12)


def test_sharpness_stays_on_the_support():
    kept = [np.asarray([False, True, True])]
    found = sharpness(bowl(np.diag([100.0, 2.0, 1.0])), [np.zeros(3)], 1.0, steps=60, support=kept)
    assert found == pytest.approx(1.0, abs=1e-3)


def test_a_loss_that_is_not_a_number_is_not_hidden():
    def broken(arrays):
        return (0.0 if (arrays[0] == 1).all() else np.nan), [np.ones(2)]

    assert np.isnan(sharpness(broken, [np.ones(2)], 0.1, steps=3))
    assert np.isnan(sharpness(lambda x: (0.0, [np.asarray([np.inf, 1])]), [np.ones(2)], 0.1))
    assert np.isnan(sharpness(lambda x: (0.0, [x[0] * np.nan]), [np.ones(2)], 0.1, steps=2))
    assert np.isnan(Sharpness([1.0, math.nan]).mean)
    assert np.isnan(Sharpness([math.nan, 1.0]).worst)


@pytest.mark.parametrize("points", [5, 6])
def test_the_landscape_of_a_quadratic_is_its_parabola(library, points):
    rng = np.random.default_rng(0)
    matrix, x = symmetric(INDEFINITE), rng.normal(size=10)
    d1, d2 = rng.normal(size=(2, 10))

    def value(arrays):
        return bowl(matrix, library)(arrays)[0]

    arrays, directions = [library.asarray(x)], [[library.asarray(d)] for d in (d1, d2)]
    line = landscape(value, arrays, directions[:1], radius=0.5, points=points)
    plane = landscape(value, arrays, directions, radius=0.5, points=points)
    np.testing.assert_allclose(line.coordinates, np.linspace(-0.5, 0.5, points), atol=1e-15)

    def expected(a, b):
        y = x + a * d1 + b * d2
        return y @ matrix @ y / 2

    grid = plane.coordinates
    np.testing.assert_allclose(line.values, [expected(a, 0) for a in grid], rtol=1e-12)
    np.testing.assert_allclose(
        plane.values, [[expected(a, b) for b in grid] for a in grid], rtol=1e-12
    )
    if points % 2:
        assert line.values[points // 2] == float(value(arrays))


FILTERS = {  # and the axes within one
    OUTPUT_INPUT: (1, 2),
    Layout(input_axes=(0,), output_axes=(1, 2)): (0,),  # attention heads
    Layout(input_axes=(1,), output_axes=(2,), batch_axes=(0,)): (1,),  # a stack
    Layout(output_axes=(0, 1, 2)): (),
}


@pytest.mark.parametrize("layout", FILTERS)
def test_filters_keep_their_norms(layout):
    check_filters(Backend.NUMPY, layout, FILTERS[layout], (3, 4, 5))


def test_filters_keep_their_norms_in_every_library(library):
    check_filters(library, OUTPUT_INPUT, (1,), (2, 3))


def check_filters(library: Backend, layout: Layout, inside: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=shape), rng.normal(size=4)
    kept = rng.random(size=weight.shape) < 0.5
    weight[0] = 0
    arrays = [library.asarray(x) for x in (weight, bias)]

    def norms(x):
        return np.sqrt((x**2).sum(inside)) if inside else np.abs(x)

    for support in (None, [library.asarray(kept), None]):
        d, of_bias = filter_direction(arrays, [layout, None], support=support)
        w = weight if support is None else np.where(kept, weight, 0)
        np.testing.assert_allclose(norms(library.to_numpy(d)), norms(w), rtol=1e-12)
        assert (library.to_numpy(of_bias) == 0).all()
        assert support is None or (library.to_numpy(d)[~kept] == 0).all()


def test_directions_differ_and_vectors_move_if_asked():
    arrays, layouts = [np.ones((4, 50)), np.asarray([3.0, 4.0])], [OUTPUT_INPUT, None]
    (a, _), (b, _) = (filter_direction(arrays, layouts, index=i) for i in (0, 1))
    assert np.abs((a * b).sum(1)).max() < 30  # of a squared norm of 50
    moved = filter_direction(arrays, layouts, vectors=True)[1]
    assert np.linalg.norm(moved) == pytest.approx(5)


# Figures


def planes() -> dict[str, Landscape]:
    places = np.linspace(-1, 1, 5)
    plane = places[:, None] ** 2 + 3 * places + 4
    return {"ADMM": Landscape(places, 2 * plane), "SAFE": Landscape(places, plane)}


def test_contours_share_their_levels_and_their_axes_are_the_directions():
    figure = plot_contours(planes(), levels=7)
    first, second, _ = figure.axes
    levels = [panel.collections[0].levels for panel in (first, second)]
    np.testing.assert_array_equal(*levels)
    assert (levels[0][0], levels[0][-1]) == (1.0, 16.0)
    # The loss falls and rises again to the right, and rises steadily upwards.
    filled = [p.vertices for p in second.collections[0].get_paths() if len(p.vertices)]
    highest = filled[-1]
    assert highest[:, 1].min() > 0
    assert (highest[:, 0].min(), highest[:, 0].max()) == (-1, 1)


def test_figures_are_saved_as_vectors_and_points(tmp_path):
    lines = {name: Landscape(a, v[:, 0]) for name, (a, v) in planes().items()}
    figure = plot_lines(lines)
    assert [line.get_label() for line in figure.axes[0].lines] == ["ADMM", "SAFE"]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), lines["SAFE"].values)
    pdf, png = save(figure, tmp_path / "line.v1")
    assert (pdf.name, png.name) == ("line.v1.pdf", "line.v1.png")
    assert b"/FontFile2" in pdf.read_bytes()  # TrueType, not Type 3
    assert png.read_bytes().startswith(b"\x89PNG")


def test_logarithmic_figures_and_a_level_plane():
    lines = {name: Landscape(a, v[:, 0]) for name, (a, v) in planes().items()}
    assert plot_lines(lines, log=True).axes[0].get_yscale() == "log"
    edges = plot_contours(planes(), levels=5, log=True).axes[0].collections[0].levels
    np.testing.assert_allclose(edges, [1, 2, 4, 8, 16])
    level = Landscape(np.linspace(-1, 1, 3), np.ones((3, 3)))
    assert len(plot_contours({"level": level}).axes) == 2


# Wrong arguments

ONE = [np.zeros(3)]


def identity(vectors: Any) -> Any:
    return vectors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eigenvalues(identity, ONE, 4), ValueError, "k must be at most .* 3, got 4"),
        (lambda: eigenvalues(identity, ONE, 0), ValueError, "k must be at least 1"),
        (lambda: eigenvalues(identity, ONE, 2, iterations=1), ValueError, "iterations must be"),
        (lambda: eigenvalues(identity, ONE, which="top"), ValueError, "which must be one of"),
        (lambda: eigenvalues(identity, ONE, tolerance=-1), ValueError, "tolerance must be"),
        (lambda: eigenvalues(identity, ONE, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: eigenvalues(identity, ONE, seed=2**32), ValueError, "seed must be below"),
        (lambda: eigenvalues(identity, []), ValueError, "arrays must be a list of at least one"),
        (lambda: eigenvalues(identity, [np.zeros(3, int)]), TypeError, "must be real floating"),
        (lambda: eigenvalues(identity, [np.zeros(0)]), ValueError, "at least one entry"),
        (
            lambda: eigenvalues(lambda v: [v[0][:2]], ONE),
            ValueError,
            r"product\(arrays\) must have the shapes",
        ),
        (lambda: eigenvalues(lambda v: [v[0] * np.nan], ONE), ValueError, "must be finite"),
        (lambda: trace(lambda v: [v[0] * np.inf], ONE), ValueError, "must be finite"),
        (lambda: trace(identity, ONE, 1), ValueError, "samples must be at least 2"),
        (lambda: trace(identity, ONE, support=[]), ValueError, "support must have one entry"),
        (
            lambda: trace(identity, ONE, support=[np.ones(3)]),
            ValueError,
            r"support\[0\] must be a bool array of shape \(3,\)",
        ),
        (
            lambda: trace(identity, ONE, support=[np.zeros(3, bool)]),
            ValueError,
            "at least one entry that is kept",
        ),
        (lambda: sharpness(bowl(np.eye(3)), ONE, 0), ValueError, "rho must be positive, got 0"),
        (lambda: sharpness(bowl(np.eye(3)), ONE, 1, steps=0), ValueError, "steps must be"),
        (
            lambda: sharpness(bowl(np.eye(3, dtype="f2")), [np.ones(3, "f2")], 4e-4),
            ValueError,
            "rho must be large enough to move parameters in .* float16, got 0.0004, which .* 0$",
        ),
        (lambda: landscape(float, ONE, [ONE], radius=0), ValueError, "radius must be positive"),
        (lambda: landscape(float, ONE, [ONE], points=1), ValueError, "points must be at least 2"),
        (lambda: landscape(float, ONE, []), ValueError, "directions must be one or two, got 0"),
        (lambda: filter_direction(ONE, [None]), ValueError, "layouts must name the filters"),
        (lambda: filter_direction(ONE, []), ValueError, "layouts must have one entry per array"),
        (lambda: plot_lines({}), TypeError, "landscapes must be a mapping"),
        (lambda: plot_lines(planes()), ValueError, "must have 1 direction here, got 2 for 'ADMM'"),
        (lambda: plot_contours(planes(), levels=1), ValueError, "levels must be at least 2"),
        (lambda: plot_contours(planes(), width=0), ValueError, "width must be positive"),
        (
            lambda: plot_contours({"a": Landscape(np.zeros(2), np.zeros((2, 2)))}, log=True),
            ValueError,
            "must be positive for log=True",
        ),
        (
            lambda: plot_contours({"a": Landscape(np.zeros(2), np.full((2, 2), np.nan))}),
            ValueError,
            "must hold a finite loss",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with np.errstate(invalid="ignore"), pytest.raises(error, match=message):
        call()

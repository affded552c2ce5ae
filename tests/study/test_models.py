"""The networks of the studies are the published ones, and one function in both frameworks."""

from __future__ import annotations

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from safe_core.adapters.jax import weights as jax_weights
from safe_core.adapters.jax.flax.export import to_torch_names
from safe_core.adapters.torch.weights import prunable_weights
from safe_core.study.models import (
    VGG19,
    LeNet,
    ResNet,
    architecture,
    from_state_dict,
    initial_variables,
    to_state_dict,
)
from safe_core.study.models.flax import Network, normalised
from safe_core.study.models.torch import Normalised, build

SMALL = {
    "resnet-projection": ResNet(8, width=0.25, classes=4, image=(9, 8, 1), shortcut="projection"),
    "lenet": LeNet((12, 6), classes=4, image=(5, 4, 3)),
    "vgg": VGG19(width=1 / 32, classes=4, image=(32, 64, 3)),
    "resnet": ResNet(14, width=0.25, classes=4, image=(8, 8, 3)),
}


def trained(network: Any, seed: int = 0) -> dict[str, Any]:
    """Variables in float64 of which no two entries are alike."""
    rng = np.random.default_rng(seed)

    def moved(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) + rng.uniform(0.01, 0.3, x.shape)

    return jax.tree.map(moved, initial_variables(network, seed))


def images(network: Any, count: int = 3) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((count, *network.image))


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("network", "count"),
    [
        # (window^2 * inputs + biases) * outputs, summed by hand or as published.
        (LeNet(), 785 * 300 + 301 * 100 + 101 * 10),
        (ResNet(20), 269_722),
        (ResNet(32), 464_154),
        (ResNet(56), 853_018),
        (ResNet(110), 1_727_962),
        (ResNet(20, shortcut="projection"), 272_474),
        (VGG19(), 20_035_018),
        (VGG19(classes=100), 20_035_018 + 90 * 513),
    ],
)
def test_counts_are_the_published_ones(network, count):
    assert network.parameters == count


def test_networks_have_names():
    assert architecture("resnet-32", width=2, classes=100) == ResNet(32, 2, 100)
    assert architecture("lenet-300-100", image=(28, 28, 1)) == LeNet()
    assert architecture("vgg-19") == VGG19()
    with pytest.raises(ValueError, match=r"name must be one of .*'resnet-20'.*got 'resnet20'"):
        architecture("resnet20")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(18), "depth must be 6 n"),
        (lambda: ResNet(width=0.01), "width must leave"),
        (lambda: VGG19(image=(28, 28, 1)), "image must be at least 32 by 32"),
        (lambda: LeNet(image=(28, 28)), "image must be"),
        (lambda: ResNet(shortcut="none"), "shortcut must be one of"),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.every_second
@pytest.mark.parametrize("name", SMALL)
def test_frameworks_compute_the_same_function(name):
    network, x = SMALL[name], images(SMALL[name])
    variables = trained(network)
    model, module = build(network, variables), Network(network)

    found = model.eval()(channels_first(x)).detach().numpy()
    wanted = module.apply(variables, jnp.asarray(x))
    assert found.std() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)

    found = model.train()(channels_first(x)).detach().numpy()
    wanted, after = module.apply(variables, jnp.asarray(x), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-8)
    for path, statistic in flat(from_state_dict(network, model.state_dict())).items():
        expected = flat(variables | after)[path]
        np.testing.assert_allclose(statistic, expected, rtol=1e-10, atol=1e-10, err_msg=path)
        if path.startswith("batch_stats"):
            assert np.abs(statistic - flat(variables)[path]).max() > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_parameters_of_both_frameworks_are_those_of_the_list(name):
    network = SMALL[name]
    module = Network(network)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *network.image)))
    variables = initial_variables(network, seed=0)
    assert jax.tree.map(np.shape, dict(shapes)) == jax.tree.map(np.shape, variables)
    model = build(network, variables)
    assert sum(p.numel() for p in model.parameters()) == network.parameters
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == network.parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", SMALL)
def test_conversion_is_undone(name):
    network = SMALL[name]
    variables = trained(network)
    state = to_state_dict(network, variables)
    again = from_state_dict(network, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    if name.startswith("resnet"):  # which flattens nothing, so that the axes are all there is
        jax.tree.map(np.testing.assert_array_equal, to_torch_names(variables), state)


def test_conversion_copies_where_a_transpose_moves_nothing():
    network = LeNet((1,), classes=1, image=(1, 1, 3))
    variables = jax.tree.map(jnp.asarray, initial_variables(network, seed=0))
    state = to_state_dict(network, variables)
    assert all(x.flags.writeable for x in state.values())
    again = from_state_dict(network, state)
    for i in (1, 2):
        kernel = again["params"][f"dense{i}"]["kernel"]
        assert not np.shares_memory(kernel, state[f"dense{i}.weight"])


def test_shortcuts_take_every_second_pixel_and_zeros_for_new_channels():
    network = ResNet(8, width=0.25, classes=3, image=(5, 6, 3))
    variables, x = trained(network), images(network)
    params, statistics = variables["params"], variables["batch_stats"]["norm"]
    for name, _, outputs, _ in network.blocks():  # only the way around is left
        params[name]["norm2"] = {"scale": np.zeros(outputs), "bias": np.zeros(outputs)}
    windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2))
    first = np.einsum("nhwcij,ijco->nhwo", windows, params["conv"]["kernel"])
    first = (first - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    first = np.maximum(first * params["norm"]["scale"] + params["norm"]["bias"], 0)
    kept = first[:, ::4, ::4].mean((1, 2))
    wanted = kept @ params["dense"]["kernel"][: kept.shape[1]] + params["dense"]["bias"]
    found = build(network, variables).eval()(channels_first(x)).detach()
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_conversion_names_what_is_wrong():
    network = SMALL["resnet"]
    variables, state = trained(network), to_state_dict(network, trained(network))
    del variables["batch_stats"]
    with pytest.raises(ValueError, match=r"batch_stats/norm/mean must .* shape \(4,\), got none"):
        to_state_dict(network, variables)
    state["stage1_block1.conv1.weight"] = np.zeros((4, 4))
    with pytest.raises(ValueError, match=r"conv1\.weight must .*\(4, 4, 3, 3\), got"):
        from_state_dict(network, state)


def test_initial_weights_are_those_of_he_and_of_the_seed():
    network = ResNet(8)
    first, again, other = (initial_variables(network, seed) for seed in (0, 0, 1))
    kernel = first["params"]["stage3_block1"]["conv2"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (kernel != other["params"]["stage3_block1"]["conv2"]["kernel"]).all()
    assert (first["params"]["norm"]["scale"] == 1).all()
    assert not first["params"]["dense"]["bias"].any()
    assert (first["batch_stats"]["norm"]["var"] == 1).all()


@pytest.mark.parametrize("name", ["resnet-projection", "vgg"])
def test_adapters_know_which_weights_to_prune(name):
    network = SMALL[name]
    variables = initial_variables(network, seed=0)
    kernels = {k for k in flat(variables) if k.endswith("kernel")}
    assert {k for k, x in flat(variables).items() if jax_weights.is_prunable(k, x)} == kernels
    leaves = flat(variables)
    assert all(jax_weights.layout_of(k, leaves[k], leaves=leaves) for k in kernels)
    assert len(prunable_weights(build(network, variables))) == len(kernels)


def test_normalisation_is_a_part_of_the_model():
    x, mean, std = images(SMALL["lenet"]), [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    wanted = (x - mean) / std
    found = Normalised(torch.nn.Identity(), mean, std)(channels_first(x))
    np.testing.assert_allclose(found, channels_first(wanted), rtol=1e-12)
    np.testing.assert_allclose(normalised(lambda x: x, mean, std)(jnp.asarray(x)), wanted, 1e-12)


def test_statistics_of_one_value_are_refused():
    network = SMALL["resnet-projection"]
    x = jnp.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"x must have at least 2 values .* in training, got 1"):
        Network(network).apply(trained(network), x, train=True, mutable=["batch_stats"])


def flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")

"""Blocks are trained from the solution of a layer-wise solver, in both frameworks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn
from twin_blocks import JaxBlock, for_linen, torch_model

import safe_core
from safe_core.adapters.jax.blocks import prune_blocks as prune_jax
from safe_core.adapters.jax.blocks import prune_layers, reconstruct
from safe_core.adapters.jax.flax.blocks import linen_block, nnx_block
from safe_core.adapters.torch.blocks import SafeReconstruction, prune_blocks
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import ALPS, Gram

WIDTH = 16
PATTERNS = [0.5, 0.8, "2:4", safe_core.Block((2, 2), 0.5, scope="tensor"), safe_core.Channel(0.25)]


def inputs() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(48, 3, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) / 4


def errors(solver: Any, sparsity: Any, **settings: Any) -> list[float]:
    model = torch_model(WIDTH)
    report = prune_blocks(model, torch.tensor(inputs()), solver, sparsity, **settings)
    trained = getattr(solver, "name", solver) in ("safe", "safe+")
    assert {block.training_kept for block in report.blocks} == {True if trained else None}
    return [block.relative_error for block in report.blocks]


@pytest.mark.every_second
@pytest.mark.parametrize("name", ["safe+", "safe"])
@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_the_default_is_ahead_of_alps_in_every_block(name: str, sparsity: Any) -> None:
    found, alps = errors(name, sparsity), errors("alps", sparsity)
    assert all(a < 0.9 * b for a, b in zip(found, alps, strict=True))


@pytest.mark.every_second
@pytest.mark.parametrize("name", ["safe+", "safe"])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_jax_is_the_same(name: str, sparsity: Any) -> None:
    model = torch_model(WIDTH)
    dense = [for_linen(block) for block in model.blocks]
    kind = {"importance": "wanda" if name == "safe+" else None, "epochs": 10}
    wanted = prune_blocks(model, torch.tensor(inputs()), SafeReconstruction(**kind), sparsity)
    blocks = [linen_block(JaxBlock(), {"params": params}) for params in dense]
    got = prune_jax(blocks, jnp.asarray(inputs()), Reconstruction(**kind), sparsity)
    for found, report, block in zip(got, wanted.blocks, model.blocks, strict=True):
        assert found.training_kept is report.training_kept is True
        # The conjugate gradients of ALPS amplify rounding, and the start is their result.
        assert found.relative_error == pytest.approx(report.relative_error, rel=1e-6)
        for (path, b), (_, a) in zip(
            *map(jax.tree.leaves_with_path, (found.params, for_linen(block))), strict=True
        ):
            np.testing.assert_array_equal(a != 0, b != 0, err_msg=str(path))
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-6, err_msg=str(path))


class NnxLayers(nnx.Module):
    """Two layers of NNX."""

    def __init__(self) -> None:
        self.first, self.second = (
            nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.float64, rngs=nnx.Rngs(i)) for i in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.tanh(self.first(x)))


class LinenLayers(linen.Module):
    """The same layers of Linen."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(WIDTH, name="second")(linen.tanh(linen.Dense(WIDTH, name="first")(x)))


@pytest.mark.parametrize("name", ["safe+", "safe"])
def test_a_module_of_nnx_is_pruned_as_the_same_of_linen(name: str) -> None:
    module = NnxLayers()
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    blocks = [nnx_block(module), linen_block(LinenLayers(), {"params": params})]
    got, wanted = (prune_jax([b], jnp.asarray(inputs()), name, 0.5)[0] for b in blocks)
    assert got.training_kept is wanted.training_kept is True
    nnx.update(module, got.params)
    for layer in ("first", "second"):
        kernel, want = getattr(module, layer).kernel[...], wanted.params[layer]["kernel"]
        np.testing.assert_array_equal(kernel != 0, want != 0)
        np.testing.assert_allclose(kernel, want, rtol=0, atol=1e-6)
        assert float((kernel == 0).mean()) == 0.5


# A rate at which the loss stays finite and training ends far from where it began.
WILD: dict[str, Any] = {"learning_rate": 30.0, "epochs": 2, "warmup_epochs": 0}


def test_a_start_is_kept_if_training_makes_it_worse() -> None:
    solved, model, free = torch_model(WIDTH), torch_model(WIDTH), torch_model(WIDTH)
    x = torch.tensor(inputs())
    prune_blocks(solved, x, ALPS(), 0.5)
    told: list[Any] = []
    report = prune_blocks(model, x, SafeReconstruction(**WILD), 0.5, progress=told.append)
    assert [block.training_kept for block in report.blocks] == [False, False]
    assert [at.training_kept for at in told if at.epoch is None] == [False, False]
    assert str(report).splitlines()[1].endswith("start kept")
    assert "\ntraining did not lower the error of 2 of 2 blocks on the samples" in str(report)
    report = prune_blocks(free, x, SafeReconstruction(**WILD, start="dense"), 0.5)
    assert [block.training_kept for block in report.blocks] == [None, None]
    assert "training" not in str(report)
    for name, p in model.named_parameters():
        assert torch.equal(p, solved.get_parameter(name)), name
    # From the dense weights the same training does harm, so it was the start that was kept.
    dense = torch_model(WIDTH).blocks[0](x)
    ends = [(other.blocks[0](x) - dense).square().mean().item() for other in (solved, free)]
    assert ends[1] > 10 * ends[0]


def test_a_start_is_kept_in_jax_too() -> None:
    block = linen_block(JaxBlock(), {"params": for_linen(torch_model(WIDTH).blocks[0])})
    x = jnp.asarray(inputs())
    grams = block.grams(block.params, x)
    solved = prune_layers(block.params, grams, ALPS(), 0.5)
    found = reconstruct(
        block.apply_fn, block.params, x, 0.5, recipe=Reconstruction(**WILD), importance=grams
    )
    assert len(found.losses) == 2
    assert found.training_kept is False
    jax.tree.map(np.testing.assert_array_equal, found.params, solved)
    recipe = Reconstruction(**WILD)
    kept = [pruned.training_kept for pruned in prune_jax([block, block], x, recipe, 0.5)]
    assert kept == [False, False]


@pytest.mark.parametrize("solver", ["alps", Reconstruction(epochs=1, start="dense")], ids=str)
def test_jax_compares_nothing_without_a_training_and_a_start(solver: Any) -> None:
    block = linen_block(JaxBlock(), {"params": for_linen(torch_model(WIDTH).blocks[0])})
    (pruned,) = prune_jax([block], jnp.asarray(inputs()), solver, 0.5)
    assert pruned.training_kept is None


def test_the_learning_rate_follows_the_scale_of_the_weights() -> None:
    """A linear block that is scaled by a power of two takes the same course, scaled."""

    def pruned(scale: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False).double()])
        model.forward = lambda x: model.blocks[0](x)  # type: ignore[method-assign]
        with torch.no_grad():
            model.blocks[0].weight.mul_(scale)
        # Adam's epsilon has a scale of its own, which these losses are far above.
        prune_blocks(model, 64 * torch.tensor(inputs()), SafeReconstruction(epochs=5), 0.5)
        return model.blocks[0].weight.detach() / scale

    torch.testing.assert_close(pruned(1.0), pruned(8.0), rtol=1e-6, atol=1e-8)


def test_a_start_without_gram_matrices_is_refused_in_jax() -> None:
    params, x = {"kernel": jnp.ones((4, 4))}, jnp.ones((2, 4))
    message = r"importance must hold Gram matrices, .* alps .* or .* start='dense', got NoneType"
    with pytest.raises(ValueError, match=message):
        reconstruct(lambda p, x: x @ p["kernel"], params, x, 0.5, recipe=Reconstruction())


def test_without_a_recipe_gram_matrices_choose_the_start() -> None:
    rng = np.random.default_rng(0)
    params, x = {"kernel": jnp.asarray(rng.normal(size=(16, 8)))}, jnp.asarray(inputs()[:, 0])

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"]

    grams = {"kernel": Gram.of(x)}
    given = reconstruct(apply, params, x, 0.5, importance=grams)
    plus = Reconstruction(importance="wanda")
    start = reconstruct(apply, params, x, 0.5, recipe=plus, importance=grams)
    dense = reconstruct(apply, params, x, 0.5, recipe=Reconstruction(start="dense"))
    jax.tree.map(np.testing.assert_array_equal, given.params, start.params)
    jax.tree.map(
        np.testing.assert_array_equal, reconstruct(apply, params, x, 0.5).params, dense.params
    )
    assert given.losses[-1] < dense.losses[-1]


def test_gram_matrices_of_the_start_are_no_importance() -> None:
    """Without importance entries rank by magnitude, although the start needs the inputs."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(16, 8)))}
    x = jnp.asarray(inputs()[:, 0] * np.linspace(0.1, 3.0, WIDTH))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"]

    def support(importance: Any) -> np.ndarray:
        # The targets make the start a bad one, and the penalty is too small to keep its support.
        method = safe_core.admm(0.5, penalty=1e-9, dual_update_interval=1)
        recipe = Reconstruction(
            method, learning_rate=0.05, epochs=10, start="alps", importance=importance
        )
        found = reconstruct(
            apply, params, x, 0.5, recipe=recipe, importance={"kernel": Gram.of(x)},
            targets=-apply(params, x),
        )  # fmt: skip
        return np.asarray(found.params["kernel"] != 0)

    assert support(None).sum() == support("wanda").sum() == 64
    assert (support(None) != support("wanda")).any()


def test_masked_zeros_of_dense_weights_stay() -> None:
    """Weights that are not pruned keep their zeros under a start too."""
    model = torch_model(WIDTH)
    with torch.no_grad():
        model.blocks[0].down.weight[::2] = 0
    before = copy.deepcopy(model.blocks[0].down.weight)
    solver = SafeReconstruction(epochs=2)
    prune_blocks(model, torch.tensor(inputs()), solver, 0.5, where=lambda name, p: "up" in name)
    after = model.blocks[0].down.weight
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)


def test_a_run_resumes_from_its_start_but_not_at_another_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, solver = torch.tensor(inputs()), SafeReconstruction(epochs=2)
    whole, resumed = torch_model(WIDTH), torch_model(WIDTH)
    prune_blocks(whole, x, solver, 0.5)
    stopped = []

    def stop(progress: Any) -> None:
        stopped.append(progress)
        if progress.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_blocks(resumed, x, solver, 0.5, work_dir=tmp_path, progress=stop)
    again = torch_model(WIDTH)
    prune_blocks(again, x, solver, 0.5, work_dir=tmp_path)
    for name, p in again.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name
    monkeypatch.setattr("safe_core.solvers.reconstruction._RATE", 0.02)
    with pytest.raises(ValueError, match=r": peak was 0\.01, now 0\.02; name"):
        prune_blocks(torch_model(WIDTH), x, solver, 0.5, work_dir=tmp_path)


def test_a_decoupled_penalty_needs_a_rate_in_jax() -> None:
    params, x = {"kernel": jnp.ones((4, 4))}, jnp.ones((2, 4))
    recipe = Reconstruction(safe_core.admm(0.5, penalty=0.1, decoupled=True))
    with pytest.raises(ValueError, match="learning_rate must be given for a method with a decou"):
        reconstruct(lambda p, x: x @ p["kernel"], params, x, 0.5, recipe=recipe)
    # PyTorch reads the rate from the param group.
    prune_blocks(torch_model(WIDTH), torch.tensor(inputs()), SafeReconstruction(recipe.method), 0.5)

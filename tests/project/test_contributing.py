"""The parts that CONTRIBUTING adds work as written: in PyTorch, optax and on the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
import torch
import transformers
from short_runs import short_run
from torch import nn
from typer.testing import CliRunner

import safe_core
from safe_core import ADMM, Method
from safe_core.adapters.jax import finalize, report, sparse_optimizer
from safe_core.adapters.jax.blocks import prune_layers
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.blocks import prune_blocks
from safe_core.command_line.app import app
from safe_core.solvers import Gram
from safe_core.study.runner import parse_recipe

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"```python\n# file: (\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
METHODS = ("quadratic_penalty", "channel_radius", "moving_magnitude")


def part(name: str) -> ModuleType:
    """The module of a code block."""
    module = ModuleType(name)
    sys.modules[name] = module  # where dataclasses look for their types
    exec(compile(PARTS[name], f"{name}.py", "exec"), module.__dict__)
    return module


def method_of(name: str) -> Method:
    """The method that shows a part."""
    if name == "input_groups":
        return Method(part(name).PATTERN, ADMM(0.1, 4))
    return part(name).METHOD  # type: ignore[no-any-return]


RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.standard_normal((32, 8)), RNG.standard_normal((32, 4))
WEIGHT = RNG.standard_normal((4, 8))


def train_in_torch(method: Method) -> tuple[np.ndarray, np.ndarray, list[str], Any]:
    """The trained weight, its projection, names of a report's figures, and the importance."""
    model = nn.Linear(8, 4).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(WEIGHT))
        model.bias.zero_()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)
    x, y = torch.from_numpy(INPUTS), torch.from_numpy(TARGETS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    figures = list(optimizer.report().scalars())
    held = optimizer.state[model.weight].get("importance")
    trained = model.weight.detach().numpy().copy()
    optimizer.finalize()
    optimizer.check_sparsity()
    return trained, model.weight.detach().numpy(), figures, held


def train_in_jax(method: Method) -> tuple[np.ndarray, np.ndarray, list[str], Any]:
    """The same in optax, in the layout of PyTorch."""
    params = {"kernel": jnp.asarray(WEIGHT.T), "bias": jnp.zeros(4)}
    tx = sparse_optimizer(optax.sgd(0.05, momentum=0.9), method)

    def loss(params: Any) -> Any:
        return jnp.mean((INPUTS @ params["kernel"] + params["bias"] - TARGETS) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grad_fn = jax.grad(loss)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    figures = list(report(params, state, method).scalars())
    projected = finalize(params, state, method)
    held = None if state.importance is None else state.importance["kernel"].T
    return np.asarray(params["kernel"]).T, np.asarray(projected["kernel"]).T, figures, held


def test_all_five_parts_are_shown() -> None:
    assert set(PARTS) == {"input_groups", "rescaled", *METHODS}


@short_run
@pytest.mark.parametrize("name", ["input_groups", *METHODS])
def test_both_frameworks_train_with_the_part_alike(name: str) -> None:
    method = method_of(name)
    in_torch, in_jax = train_in_torch(method), train_in_jax(method)
    for a, b in zip(in_torch[:2], in_jax[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    assert np.count_nonzero(in_torch[1]) == 16
    plain = train_in_torch(safe_core.admm(0.5, penalty=0.1, dual_update_interval=4))
    assert not np.allclose(in_torch[0], plain[0], rtol=1e-6)
    figures = {figure.partition("/")[0] for figure in in_torch[2]}
    assert figures == {figure.partition("/")[0] for figure in in_jax[2]} >= {"distance", "zeros"}


@short_run
def test_the_importance_follows_the_parameters_in_both_frameworks() -> None:
    *_, in_torch = train_in_torch(method_of("moving_magnitude"))
    *_, in_jax = train_in_jax(method_of("moving_magnitude"))
    np.testing.assert_allclose(in_torch, in_jax, rtol=1e-10)
    assert not np.allclose(in_torch, np.abs(WEIGHT), rtol=1e-3)


def test_the_pattern_zeroes_whole_groups(xp: Any) -> None:
    pattern = part("input_groups").PATTERN

    def project(x: Any) -> Any:
        return safe_core.project(x, pattern).support

    support = xp.run(project, np.arange(1.0, 33.0).reshape(2, 16))
    assert support.tolist() == [[False] * 8 + [True] * 8] * 2
    with pytest.raises(ValueError, match="input axis of arrays has 6 entries, which 4 does not"):
        safe_core.project(np.ones((2, 6)), pattern)


@short_run
def test_the_penalty_of_the_constraint_pulls_to_the_projection() -> None:
    trained, projected, *_ = train_in_torch(method_of("quadratic_penalty"))
    free, cut, *_ = train_in_torch(safe_core.magnitude(0.5))
    assert np.linalg.norm(trained - projected) < np.linalg.norm(free - cut)


def test_the_perturbation_follows_the_channels() -> None:
    perturbation = part("channel_radius").ChannelRadius(0.5)
    x, g = np.asarray([[3.0, 4.0], [0.0, 1.0]]), np.asarray([[1.0, 0.0], [0.0, 1.0]])
    layouts = [safe_core.Layout((1,), (0,))]
    (e,) = perturbation.perturbation([x], [g], rho=0.5, layouts=layouts)
    np.testing.assert_allclose(e, 0.5 / np.sqrt(2) * np.asarray([[1.0, 0.0], [0.0, 0.2]]))


class Chain(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_solver_and_the_pattern_prune_blocks() -> None:
    model, solver = Chain(), part("rescaled").SOLVER
    before = [block.weight.detach().clone() for block in model.blocks]
    found = prune_blocks(model, torch.randn(16, 8), solver, part("input_groups").PATTERN)
    assert found.sparsity == 0.5
    for block, w in zip(model.blocks, before, strict=True):
        groups = block.weight.detach().reshape(8, 2, 4)
        assert sorted((groups == 0).all(dim=2).all(dim=0).tolist()) == [False, True]
        torch.testing.assert_close(block.weight.detach().norm(), w.norm())
    params = {"kernel": jnp.asarray(WEIGHT.T)}
    grams = {"kernel": Gram.of(jnp.asarray(INPUTS))}
    pruned = prune_layers(params, grams, solver, 0.5)["kernel"]
    assert int((pruned == 0).sum()) == 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama that reads bytes, with a text and the parts in its folder."""
    folder = tmp_path_factory.mktemp("model")
    letters = {chr(i): i for i in range(256)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 100, encoding="utf-8")
    for name, source in PARTS.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--sparsity {}/input_groups.py:PATTERN --method alps", "InputGroups"),
        ("--method {}/rescaled.py:SOLVER", "Rescaled"),
        ("--method {}/quadratic_penalty.py:METHOD --epochs 1", "QuadraticPenalty"),
        ("--method {}/channel_radius.py:METHOD --epochs 1", "0.05"),
        ("--method {}/moving_magnitude.py:METHOD --epochs 1", "MovingMagnitude"),
    ],
    ids=["pattern", "solver", "constraint", "perturbation", "importance"],
)
def test_the_command_line_takes_the_part(
    model: Path, tmp_path: Path, options: str, said: str
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(model), "--calibration", str(model / "text.txt"), "--out", str(out)]
    arguments += ["--samples", "8", "--length", "16", *options.format(model).split()]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert said in (out / "README.md").read_text(encoding="utf-8")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    layer = loaded.model.layers[0]
    for weight in (layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight):
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_a_recipe_takes_the_part(model: Path) -> None:
    recipe = parse_recipe(
        """
        title = "A part of one's own"
        sparsities = [0.5]
        seeds = [0]
        [data]
        name = "digits"
        [model]
        name = "lenet-300-100"
        [training]
        epochs = 1
        batch_size = 64
        learning_rate = 0.1
        [[methods]]
        method = "quadratic_penalty.py:quadratic_penalty"
        """,
        folder=model,
    )
    (entry,) = recipe.methods
    built = entry.build(0.5, epochs=1, steps_per_epoch=5, seed=0)
    assert type(built.constraint).__name__ == "QuadraticPenalty"

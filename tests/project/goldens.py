"""Golden trajectories: hashes of what every method does, to the last bit.

``python tests/project/goldens.py --write tests/project/goldens.json`` records them, and
``--check`` in place of ``--write`` compares; ``--only TEXT`` takes the cases whose name holds
a text. A case is a name and a function that returns arrays by name; what is
kept of an array is a short hash of its dtype, shape and bytes.

With ``JAX_COMPILATION_CACHE_DIR`` a second run takes a fraction of the time; without
``JAX_DISABLE_MOST_OPTIMIZATIONS``, as here, JAX computes other bits than with it.

Bits depend on the processor and on the versions of NumPy, PyTorch and JAX, so record before a
change and check after it on the same machine. Names of arguments, of state entries and of
imports that a refactoring may change are at the top, each once.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

import safe_core
from safe_core import NM, Block, Channel, Layout, Method, SquaredGradient, Unstructured, schedules
from safe_core.adapters.jax.blocks import Block as JaxBlock
from safe_core.adapters.jax.blocks import prune_blocks as jax_prune_blocks
from safe_core.adapters.jax.blocks import prune_layers, reconstruct
from safe_core.adapters.jax.reporting import report as jax_report
from safe_core.adapters.optax import finalize, find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.transformers import SafeReconstruction, prune_blocks
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import ALPS, Gram, Magnitude, SparseGPT, Wanda

STEPS = 40
INTERVAL = 5
SPARSITY = 0.6

# Methods that JAX runs with Adam too: each is a program of seconds to compile.
JAX_WITH_ADAM = ("safe", "safe_reuse", "safe_combined", "admm", "gmp")

Arrays = dict[str, Any]

# What a refactoring may rename


def methods() -> dict[str, Method]:
    """Every method of the training cases, by a name of ours."""
    ramp = schedules.cubic(0.7, steps=30, every=5)
    stairs = schedules.linear_sparsity(0.7, steps=30, every=10)
    drawn = schedules.random_sparsity((0.3, 0.5, 0.7), seed=1)
    source = SquaredGradient(0.9)
    rising = schedules.linear(0.3, steps=STEPS, initial=0.05)
    common: dict[str, Any] = {"penalty": 0.1, "dual_update_interval": INTERVAL}
    safe = functools.partial(safe_core.safe, rho=0.05, **common)
    admm = functools.partial(safe_core.admm, **common)
    return {
        "safe": safe(SPARSITY),
        "safe_adaptive": safe(SPARSITY, adaptive=True),
        "safe_importance": safe(SPARSITY, importance=source),
        "safe_importance_tensor": safe(Unstructured(SPARSITY, scope="tensor"), importance=source),
        "safe_interval": safe(SPARSITY, perturbation_interval=3),
        "safe_reuse": safe(SPARSITY, perturbation_interval=2, reuse=0.5),
        "safe_relaxation": safe(SPARSITY, relaxation=1.5),
        "safe_rescale_dual": safe_core.safe(
            SPARSITY, rho=0.05, penalty=rising, dual_update_interval=INTERVAL, rescale_dual=True
        ),
        "safe_schedules": safe_core.safe(
            SPARSITY,
            rho=schedules.linear(0.1, steps=20),
            penalty=schedules.cosine(0.3, steps=STEPS),
            dual_update_interval=INTERVAL,
        ),
        "safe_bfloat16_state": safe(SPARSITY, state_dtype="bfloat16"),
        "safe_decoupled": safe(SPARSITY, decoupled=True),
        "safe_projected_gradient": safe(SPARSITY, projected_gradient=True),
        "safe_multi": safe(drawn),
        "safe_multi_projected_gradient": safe(drawn, projected_gradient=True),
        "safe_cubic": safe(ramp),
        "safe_combined": safe(
            "2:4",
            adaptive=True,
            importance=source,
            relaxation=0.8,
            perturbation_interval=2,
            reuse=0.3,
            state_dtype="bfloat16",
            decoupled=True,
        ),
        "admm": admm(SPARSITY),
        "admm_combined": admm(
            SPARSITY, importance=source, relaxation=1.2, decoupled=True, projected_gradient=True
        ),
        "admm_2_4": admm("2:4"),
        "admm_ragged_3": admm(NM(1, 3, ragged="dense")),
        "admm_block": admm(Block((2, 2), 0.5)),
        "admm_block_global": admm(Block((3, 2), 0.5, scope="global", ragged="dense")),
        "admm_channel": admm(Channel(0.5)),
        "admm_channel_global": admm(Channel(0.5, scope="global"), importance=source),
        "admm_row": admm(Unstructured(SPARSITY, scope="row")),
        "admm_tensor": admm(Unstructured(SPARSITY, scope="tensor")),
        "admm_kernel_rule": admm(
            Unstructured(0.8, scope="tensor", distribution="erdos_renyi_kernel")
        ),
        "admm_named_budget_torch": admm(
            Unstructured(SPARSITY, scope="tensor", distribution={"hidden.weight": 0.9})
        ),
        "admm_named_budget_jax": admm(
            Unstructured(SPARSITY, scope="tensor", distribution={"hidden/kernel": 0.9})
        ),
        "magnitude": safe_core.magnitude(SPARSITY),
        "magnitude_importance": safe_core.magnitude(
            SPARSITY, importance=source, importance_interval=INTERVAL
        ),
        "gmp": safe_core.gmp(ramp),
        "gmp_importance": safe_core.gmp(ramp, importance=source),
        "gmp_row": safe_core.gmp(Unstructured(stairs, scope="row")),
        "imp_sam": safe_core.imp_sam(stairs, rho=0.05),
        "imp_sam_adaptive": safe_core.imp_sam(ramp, rho=0.05, adaptive=True, importance=source),
        "iht": safe_core.iht(SPARSITY, interval=4),
        "iht_importance": safe_core.iht(SPARSITY, interval=1, importance=source),
        "cram": safe_core.cram(SPARSITY, rho=0.05),
        "cram_plus": safe_core.cram(SPARSITY, rho=0.05, plus=True),
        "cram_importance": safe_core.cram(
            SPARSITY, rho=0.05, importance=source, importance_interval=INTERVAL
        ),
        "cram_multi": safe_core.cram(drawn, rho=0.05, plus=True),
        "cram_2_4": safe_core.cram("2:4", rho=0.05),
    }


def patterns() -> dict[str, Any]:
    """Every pattern that a projection is compared by; the arrays are named a, b and c."""
    return {
        "fraction": 0.5,
        "tensor": Unstructured(0.7, scope="tensor"),
        "row": Unstructured(0.4, scope="row"),
        "kernel_rule": Unstructured(0.6, scope="tensor", distribution="erdos_renyi_kernel"),
        "kernel_rule_row": Unstructured(0.6, scope="row", distribution="erdos_renyi_kernel"),
        "named_budget": Unstructured(0.5, scope="tensor", distribution={"b": 0.9}),
        "2_4": "2:4",
        "ragged_3": NM(2, 3, ragged="dense"),
        "block": Block((2, 2), 0.5),
        "block_global": Block((2, 4), 0.5, scope="global"),
        "block_ragged": Block((4, 3), 0.5, ragged="dense"),
        "channel": Channel(0.5),
        "channel_global": Channel(0.4, scope="global"),
        "cubic": schedules.cubic(0.7, steps=30, every=5),
    }


def torch_solvers() -> dict[str, Any]:
    """Solvers of blocks in PyTorch: those that have a name, and some with settings."""
    named = ("safe+", "safe", "alps", "sparsegpt", "wanda", "magnitude")
    method = safe_core.safe(0.5, rho=0.01, penalty=0.1, dual_update_interval=2)
    own = {"method": method, "learning_rate": 0.02, "epochs": 4, "batch_size": 3}
    return {name: name for name in named} | {
        "own_safe": SafeReconstruction(**own),
        "own_safe+": SafeReconstruction(**own, importance="wanda"),
        "own_admm": Reconstruction(method=safe_core.admm(0.5), epochs=3, warmup_epochs=1),
    }


def jax_solvers() -> dict[str, Any]:
    """Solvers of blocks in JAX."""
    method = safe_core.safe(0.5, rho=0.01, penalty=0.1, dual_update_interval=2)
    own = {"method": method, "learning_rate": 0.02, "epochs": 4, "batch_size": 3}
    return {
        "safe": Reconstruction(**own),
        "safe+": Reconstruction(**own, importance="wanda"),
        "alps": ALPS(),
        "sparsegpt": SparseGPT(),
        "wanda": Wanda(),
        "magnitude": Magnitude(),
    }


def torch_state_arrays(optimizer: SparseOptimizer) -> Arrays:
    """What our optimizer holds of its parameters: anchors, supports, importances, directions."""
    names = {p: name for name, p in optimizer.sparse_parameters().items()}
    every = [p for group in optimizer.param_groups for p in group["params"]]
    found: Arrays = {"steps": np.asarray(optimizer.steps)}
    for i, p in enumerate(every):
        for key in ("anchor", "support", "importance", "flat_direction"):
            if key in optimizer.state.get(p, {}):
                found[f"{key}/{names.get(p, i)}"] = optimizer.state[p][key]
    return found


def jax_state_arrays(state: Any) -> Arrays:
    """As `torch_state_arrays`, of the state of an optax transformation."""
    ours = find_state(state)
    found: Arrays = {"steps": np.asarray(int(ours.step))}
    for key in ("anchor", "support", "importance", "flat_direction"):
        found |= named_leaves(getattr(ours, key), key)
    return found


def figures(report: Any) -> Arrays:
    """The figures of a report, in the order of their names."""
    found = report.scalars()
    return {
        "report": np.asarray(
            [
                float(found[key])
                for key in sorted(found, key=lambda key: key.replace("mask_change", "churn"))
            ]
        )
    }


# Hashes


def short_hash(array: Any) -> str:
    """A short hash of the dtype, shape and bytes of an array of any library."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().contiguous()
        kind = str(array.dtype).removeprefix("torch.")
        if array.dtype == torch.bfloat16:
            array = array.view(torch.int16)
        array = array.numpy()
    else:
        array = np.asarray(array)
        kind = array.dtype.name
    digest = hashlib.sha256(f"{kind}{tuple(array.shape)}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def named_leaves(tree: Any, prefix: str) -> Arrays:
    """The leaves of a pytree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in leaves
    }


# The problem: an embedding, a convolution and two layers


@functools.cache
def initial_weights() -> dict[str, np.ndarray]:
    """Weights by name, in the layout of PyTorch."""
    rng = np.random.default_rng(0)
    shapes = {
        "embedding.weight": (11, 4),
        "conv.weight": (8, 4, 3),
        "conv.bias": (8,),
        "hidden.weight": (12, 32),
        "hidden.bias": (12,),
        "out.weight": (4, 12),
        "out.bias": (4,),
    }
    return {
        name: (0.4 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


@functools.cache
def batches() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Tokens and targets of four batches, which are taken in turn."""
    rng = np.random.default_rng(1)
    return tuple(
        (rng.integers(0, 11, (8, 6)), rng.standard_normal((8, 4)).astype(np.float32))
        for _ in range(4)
    )


class Net(nn.Module):
    """The network in PyTorch."""

    def __init__(self, *, noisy: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 8, 3)
        self.hidden = nn.Linear(32, 12)
        self.out = nn.Linear(12, 4)
        self.norm = nn.BatchNorm1d(8) if noisy else nn.Identity()
        self.dropout = nn.Dropout(0.3) if noisy else nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.conv(self.embedding(tokens).transpose(1, 2))))
        return self.out(self.dropout(torch.tanh(self.hidden(x.flatten(1)))))


def torch_model(dtype: torch.dtype = torch.float32, *, noisy: bool = False) -> Net:
    """The network with its initial weights."""
    model = Net(noisy=noisy)
    weights = {name: torch.from_numpy(array.copy()) for name, array in initial_weights().items()}
    model.load_state_dict(weights, strict=not noisy)
    return model.to(dtype)


def jax_params(dtype: Any = jnp.float32) -> Any:
    """The same weights, as Flax stores them."""
    params: dict[str, dict[str, Any]] = {}
    for name, array in initial_weights().items():
        module, kind = name.split(".")
        if module == "embedding":
            kind = "embedding"
        elif kind == "weight":
            kind, array = "kernel", np.moveaxis(array, (0, 1), (-1, -2))
        params.setdefault(module, {})[kind] = jnp.asarray(np.ascontiguousarray(array), dtype)
    return params


def jax_loss(params: Any, tokens: Any, targets: Any) -> Any:
    """The loss of the network in JAX."""
    x = params["embedding"]["embedding"][tokens]
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = jnp.tanh(x + params["conv"]["bias"])
    x = jnp.tanh(x.reshape(len(x), -1) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    x = x @ params["out"]["kernel"] + params["out"]["bias"]
    return jnp.mean((x.astype(jnp.float32) - targets) ** 2)


# Training in PyTorch


def torch_base(kind: str, params: Any) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam."""
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return torch.optim.Adam(params, lr=0.01)


class TorchRun:
    """A model, its optimizer and the losses so far."""

    def __init__(
        self,
        method: Method,
        base: str,
        *,
        dtype: torch.dtype = torch.float32,
        noisy: bool = False,
        groups: Callable[[Net], Any] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = torch_model(dtype, noisy=noisy)
        params = self.model.parameters() if groups is None else groups(self.model)
        if "where" in options:
            params = self.model.named_parameters()
        else:
            options["model"] = self.model
        self.optimizer = SparseOptimizer(torch_base(base, params), method, **options)
        self.losses: list[float] = []

    def loss(self, step: int) -> torch.Tensor:
        """The loss on the batch of a step."""
        tokens, targets = map(torch.from_numpy, batches()[step % 4])
        return nn.functional.mse_loss(self.model(tokens).float(), targets)

    def train(self, steps: int, *, by_phase: bool = False, loss_scale: float = 1.0) -> TorchRun:
        """Take steps with a closure, or phase by phase with a scaled loss."""
        optimizer = self.optimizer
        for _ in range(steps):
            step = len(self.losses)

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss = self.loss(step)
                loss.backward()
                return loss

            if not by_phase:
                self.losses.append(float(optimizer.step(closure)))
                continue
            optimizer.zero_grad()
            loss = self.loss(step)
            (loss_scale * loss).backward()
            if optimizer.perturbs:
                with optimizer.perturbed(loss_scale=loss_scale):
                    (loss_scale * self.loss(step)).backward()
            if optimizer.projects:
                with optimizer.projected():
                    (loss_scale * self.loss(step)).backward()
            for p in self.model.parameters():
                p.grad = p.grad / loss_scale
            optimizer.step()
            self.losses.append(float(loss))
        return self

    def arrays(self) -> Arrays:
        """Parameters, buffers, our state and the losses as they are."""
        found: Arrays = {f"x/{name}": p for name, p in self.model.state_dict().items()}
        found |= torch_state_arrays(self.optimizer)
        return {key: copy.deepcopy(array) for key, array in found.items()} | {
            "losses": np.asarray(self.losses)
        }

    def finished(self, *, reports: bool = True) -> Arrays:
        """`arrays`, the report, and the parameters once they are made sparse."""
        found = self.arrays()
        if reports:
            found |= figures(self.optimizer.report())
        self.optimizer.finalize()
        return found | {f"final/{name}": p for name, p in self.model.named_parameters()}


def torch_training(method: str, base: str, *, by_phase: bool = False, **options: Any) -> Arrays:
    """A whole run."""
    scale = options.pop("loss_scale", 1.0)
    run = TorchRun(methods()[method], base, **options)
    return run.train(STEPS, by_phase=by_phase, loss_scale=scale).finished()


def torch_frozen(method: str, base: str) -> Arrays:
    """A run that goes on under a frozen support."""
    run = TorchRun(methods()[method], base).train(STEPS - 3)
    run.optimizer.finalize(freeze=True)
    before = {f"frozen/{name}": p.detach().clone() for name, p in run.model.named_parameters()}
    return before | run.train(5).finished(reports=False)


def torch_resumed(method: str, base: str) -> Arrays:
    """A run that is saved after 17 steps and goes on elsewhere."""
    first = TorchRun(methods()[method], base).train(17)
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    second = TorchRun(methods()[method], base)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.losses = list(first.losses)
    return second.train(STEPS - 17).finished()


def torch_groups(model: Net) -> list[dict[str, Any]]:
    """Groups with settings of their own."""
    return [
        {"params": model.conv.parameters(), "rho": 0.02, "penalty": 0.3},
        {"params": model.hidden.parameters(), "sparsity": "2:4", "lr": 0.02},
        {"params": model.out.parameters(), "rho": schedules.linear(0.2, steps=20)},
        {"params": model.embedding.parameters(), "sparsify": False},
    ]


def torch_gradual_groups(model: Net) -> list[dict[str, Any]]:
    """Groups with ramps of their own."""
    ramp = schedules.cubic(0.5, steps=20, every=4)
    return [
        {"params": [*model.conv.parameters(), *model.embedding.parameters()]},
        {"params": model.hidden.parameters(), "sparsity": ramp},
        {"params": model.out.parameters(), "sparsify": False},
    ]


def importance_arrays() -> dict[str, np.ndarray]:
    """P by name, in the layout of PyTorch: per entry, and per input feature."""
    rng = np.random.default_rng(2)
    shapes = {"conv.weight": (8, 4, 3), "hidden.weight": (32,), "out.weight": (4, 12)}
    return {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}


def torch_importance() -> dict[str, torch.Tensor]:
    """P as tensors."""
    return {name: torch.from_numpy(array) for name, array in importance_arrays().items()}


def torch_importance_function(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """P that follows the parameters, such that the largest do not rank first."""
    return {name: 1 / (0.01 + p.detach() ** 4) for name, p in params.items()}


def torch_layer_is_sparse(name: str, parameter: torch.Tensor) -> bool:
    """Choose the convolution and the embedding."""
    return name in ("conv.weight", "embedding.weight")


# Training in JAX


def jax_base(kind: str) -> optax.GradientTransformation:
    """SGD with momentum, or Adam."""
    return optax.sgd(0.05, momentum=0.9) if kind == "sgd" else optax.adam(0.01)


def jax_training(
    name: str, base: str, *, dtype: Any = jnp.float32, last: bool = True, **options: Any
) -> Arrays:
    """A whole run under `jax.jit`."""
    method = methods()[name]
    if method.plan().needs_learning_rate:
        options["learning_rate"] = 0.05 if base == "sgd" else 0.01
    if "importance" in options:
        options["importance"] = options["importance"]()
    tx = sparse_optimizer(jax_base(base), method, **options)
    params = jax_params(dtype)
    state = tx.init(params)  # not compiled: its parts are, once for all cases

    @jax.jit
    def step(params: Any, state: Any, tokens: Any, targets: Any) -> Any:
        def grad_fn(params: Any) -> Any:
            return jax.grad(jax_loss)(params, tokens, targets)

        loss, gradients = jax.value_and_grad(jax_loss)(params, tokens, targets)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(STEPS):
        params, state, loss = step(params, state, *map(jnp.asarray, batches()[i % 4]))
        losses.append(float(loss))
    found = named_leaves(params, "x") | jax_state_arrays(state) | {"losses": np.asarray(losses)}
    own = {key: options[key] for key in ("layout",) if key in options}
    penalty = {"penalty": options["penalty"]} if "penalty" in options else {}
    found |= figures(jax_report(params, state, method, **penalty, **own))
    on_host = {"select_on_host": True} if options.get("select_on_host") else {}
    found |= named_leaves(finalize(params, state, method, **on_host, **own), "final")
    if last:
        return found
    plain = finalize(params, state, method, importance=None, **own)
    return found | named_leaves(plain, "final_plain")


def jax_importance() -> dict[str, Any]:
    """P as arrays of JAX."""
    found = {}
    for name, array in importance_arrays().items():
        if array.ndim > 1:
            array = np.moveaxis(array, (0, 1), (-1, -2))
        found[name.replace(".weight", "/kernel")] = jnp.asarray(array)
    return found


def jax_importance_function() -> Callable[[Any], Any]:
    """P that follows the parameters, such that the largest do not rank first."""
    return lambda params: jax.tree.map(lambda p: 1 / (0.01 + p**4), params)


# Blocks


@functools.cache
def block_arrays() -> dict[str, np.ndarray]:
    """Weights and inputs of two blocks, in the layout of PyTorch."""
    rng = np.random.default_rng(3)
    shapes = {"up.weight": (12, 8), "up.bias": (12,), "down.weight": (8, 12), "down.bias": (8,)}
    found = {
        f"blocks.{i}.{name}": (0.4 * rng.standard_normal(shape)).astype(np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }
    mixing = rng.standard_normal((8, 8)) * np.linspace(0.2, 1.5, 8)
    return found | {"inputs": (rng.standard_normal((10, 5, 8)) @ mixing).astype(np.float32)}


class TorchBlock(nn.Module):
    """Two layers and a way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class TorchBlocks(nn.Module):
    """Repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TorchBlock() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def torch_blocks(solver: str, sparsity: Any, dtype: Any = torch.float32, **options: Any) -> Arrays:
    """Prune two blocks in PyTorch."""
    given = {name: torch.from_numpy(array.copy()) for name, array in block_arrays().items()}
    inputs = given.pop("inputs").to(dtype)
    model = TorchBlocks()
    model.load_state_dict(given)
    model.to(dtype)
    report = prune_blocks(model, inputs, torch_solvers()[solver], sparsity, batch_size=4, **options)
    errors = [(block.loss, block.relative_error) for block in report.blocks]
    kept = [w.kept for block in report.blocks for w in block.weights.values()]
    found: Arrays = {f"x/{name}": p for name, p in model.named_parameters()}
    return found | {"errors": np.asarray(errors), "kept": np.asarray(kept)}


def jax_block(params: Any, x: Any) -> Any:
    """The same block in JAX."""
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x + hidden @ params["down"]["kernel"] + params["down"]["bias"]


def jax_grams(params: Any, x: Any) -> dict[str, Gram]:
    """Of what its layers take."""
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return {"up/kernel": Gram.of(x), "down/kernel": Gram.of(hidden)}


def jax_block_params(i: int) -> Any:
    """Parameters of a block, as Flax stores them."""
    given = {name: block_arrays()[f"blocks.{i}.{name}"] for name in ("up.bias", "down.bias")}
    kernels = {name: block_arrays()[f"blocks.{i}.{name}.weight"].T for name in ("up", "down")}
    return {
        name: {"kernel": jnp.asarray(kernels[name]), "bias": jnp.asarray(given[f"{name}.bias"])}
        for name in kernels
    }


def jax_blocks(solver: str, sparsity: Any, **options: Any) -> Arrays:
    """Prune two blocks in JAX."""
    blocks = [JaxBlock(jax_block, jax_block_params(i), jax_grams) for i in range(2)]
    inputs = jnp.asarray(block_arrays()["inputs"])
    pruned = jax_prune_blocks(
        blocks, inputs, jax_solvers()[solver], sparsity, batch_size=4, **options
    )
    found = named_leaves([block.params for block in pruned], "x")
    errors = [(block.loss, block.relative_error, block.sparsity) for block in pruned]
    return found | {"errors": np.asarray(errors)}


def jax_one_block(sparsity: Any) -> Arrays:
    """Reconstruct one block, and prune its layers."""
    params, inputs = jax_block_params(0), jnp.asarray(block_arrays()["inputs"])
    grams, recipe = jax_grams(params, inputs), jax_solvers()["safe+"]
    trained = reconstruct(
        jax_block, params, inputs, sparsity, recipe=recipe, importance=grams, seed=1
    )
    layers = prune_layers(params, grams, jax_solvers()["wanda"], sparsity)
    found = named_leaves(trained.params, "x") | named_leaves(layers, "layers")
    return found | {"losses": np.asarray(trained.losses)}


# Projections


LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.array,
    "torch": lambda array: torch.from_numpy(array.copy()),
    "jax": jnp.asarray,
    "strict": array_api_strict.asarray,
}


def projection(pattern: str, library: str, dtype: str = "float32", **options: Any) -> Arrays:
    """Project arrays with many ties, with and without an importance."""
    rng = np.random.default_rng(4)
    shapes = {"a": (6, 12), "b": (4, 8), "c": (4, 4, 3)}
    values = {name: rng.integers(-3, 4, shape) / 2 for name, shape in shapes.items()}
    weights = {name: rng.integers(0, 3, shape) for name, shape in shapes.items()}
    weights["b"] = weights["b"][0]  # one value per input feature
    to = LIBRARIES[library]
    arrays = {name: to(array.astype(dtype)) for name, array in values.items()}
    importance = {name: to(array.astype(dtype)) for name, array in weights.items()}
    found: Arrays = {}
    for kind, given in {"plain": None, "weighted": importance}.items():
        projected = safe_core.project(arrays, patterns()[pattern], given, **options)
        for name in shapes:
            found[f"{kind}/values/{name}"] = projected.values[name]
            found[f"{kind}/support/{name}"] = projected.support[name]
    return found


# All cases


def cases() -> dict[str, Callable[[], Arrays]]:
    """Every case by its name."""
    found: dict[str, Callable[[], Arrays]] = {}

    def add(name: str, fn: Callable[..., Arrays], *arguments: Any, **options: Any) -> None:
        assert name not in found, name
        found[name] = functools.partial(fn, *arguments, **options)

    for name in methods():
        for base in ("sgd", "adam"):
            if not name.endswith("_jax"):
                add(f"torch/{name}/{base}", torch_training, name, base)
            if not name.endswith("_torch") and (base == "sgd" or name in JAX_WITH_ADAM):
                add(f"jax/{name}/{base}", jax_training, name, base)
    _add_torch(add)
    _add_jax(add)
    _add_blocks(add)
    _add_projections(add)
    return found


def _add_torch(add: Callable[..., None]) -> None:
    for name in (
        "safe", "safe_reuse", "safe_interval", "safe_projected_gradient", "safe_decoupled",
        "safe_combined", "admm_combined", "gmp", "imp_sam", "iht", "cram", "cram_plus",
    ):  # fmt: skip
        add(f"torch_phases/{name}/sgd", torch_training, name, "sgd", by_phase=True)
    for name in ("safe", "cram"):
        scaled = {"by_phase": True, "loss_scale": 8.0}
        add(f"torch_phases_scaled/{name}/adam", torch_training, name, "adam", **scaled)
    for name in ("safe", "safe_reuse", "safe_importance", "gmp", "imp_sam", "iht", "cram", "admm"):
        add(f"torch_frozen/{name}/sgd", torch_frozen, name, "sgd")
    for name in (
        "safe", "safe_reuse", "safe_bfloat16_state", "safe_importance", "gmp", "iht_importance",
        "cram_multi", "magnitude_importance",
    ):  # fmt: skip
        add(f"torch_resumed/{name}/adam", torch_resumed, name, "adam")
    for name in ("safe", "safe_decoupled"):
        add(f"torch_groups/{name}/sgd", torch_training, name, "sgd", groups=torch_groups)
    add("torch_groups/gmp/sgd", torch_training, "gmp", "sgd", groups=torch_gradual_groups)
    for name in ("safe", "gmp", "cram", "iht"):
        given = {"arrays": torch_importance(), "function": torch_importance_function}
        for kind, importance in given.items():
            label = f"torch_importance_{kind}/{name}/sgd"
            add(label, torch_training, name, "sgd", importance=importance)
    for name in ("safe", "safe_projected_gradient"):
        options = {"dtype": torch.bfloat16}
        add(f"torch_bfloat16/{name}/sgd", torch_training, name, "sgd", **options)
        options = {"noisy": True, "replay_rng": True}
        add(f"torch_noisy/{name}/sgd", torch_training, name, "sgd", **options)
    add("torch_where/safe/sgd", torch_training, "safe", "sgd", where=torch_layer_is_sparse)


def _add_jax(add: Callable[..., None]) -> None:
    add("jax_on_host/safe/sgd", jax_training, "safe", "sgd", select_on_host=True)
    add("jax_bfloat16/safe/sgd", jax_training, "safe", "sgd", dtype=jnp.bfloat16)
    for name in ("safe", "gmp"):
        given = {"arrays": jax_importance, "function": jax_importance_function}
        for kind, importance in given.items():
            options = {"importance": importance, "last": False}
            add(f"jax_importance_{kind}/{name}/sgd", jax_training, name, "sgd", **options)
    overrides = {"rho": schedules.linear(0.1, steps=20), "penalty": 0.2}
    add("jax_overrides/safe/sgd", jax_training, "safe", "sgd", **overrides)
    layout = {"hidden/kernel": Layout(input_axes=(1,), output_axes=(0,))}
    add("jax_layout/admm_row/sgd", jax_training, "admm_row", "sgd", layout=layout)


def _add_blocks(add: Callable[..., None]) -> None:
    for solver in torch_solvers():
        add(f"torch_blocks/{solver}/half", torch_blocks, solver, 0.5)
    for solver in ("own_safe+", "alps", "sparsegpt", "wanda", "magnitude"):
        add(f"torch_blocks/{solver}/2:4", torch_blocks, solver, "2:4")
    for solver in ("own_safe", "alps"):
        options = {"target_inputs": "dense", "seed": 3}
        add(f"torch_blocks_dense_targets/{solver}/half", torch_blocks, solver, 0.5, **options)
        options = {"propagate": "dense", "dtype": torch.bfloat16}
        add(f"torch_blocks_bfloat16/{solver}/half", torch_blocks, solver, 0.5, **options)
    for solver in jax_solvers():
        add(f"jax_blocks/{solver}/half", jax_blocks, solver, 0.5)
    add("jax_blocks/wanda/2:4", jax_blocks, "wanda", "2:4")
    add(
        "jax_blocks_dense_targets/safe/half", jax_blocks, "safe", 0.5, target_inputs="dense", seed=3
    )
    add("jax_one_block/2:4", jax_one_block, "2:4")


def _add_projections(add: Callable[..., None]) -> None:
    for pattern in patterns():
        for library in LIBRARIES:
            add(f"project/{pattern}/{library}", projection, pattern, library)
        add(f"project_float64/{pattern}/numpy", projection, pattern, "numpy", "float64")
    for pattern in ("fraction", "row", "2_4", "block"):
        for library in ("torch", "jax"):
            options = {"select_on_host": True}
            add(f"project_on_host/{pattern}/{library}", projection, pattern, library, **options)


def run_case(name: str) -> dict[str, str]:
    """Run a case in single precision on one thread; hashes by the names of its arrays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), jax.enable_x64(False):
            warnings.simplefilter("ignore")  # 16-bit parameters warn of their rounding
            found = cases()[name]()
            return {key: short_hash(array) for key, array in sorted(found.items())}
    finally:
        torch.set_num_threads(threads)


def read(path: Path) -> dict[str, dict[str, str]]:
    """The hashes that were recorded, by case."""
    return json.loads(path.read_text())


def differences(got: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The names of arrays that differ, or that only one of the two has."""
    return sorted(key for key in got.keys() | wanted.keys() if got.get(key) != wanted.get(key))


def main() -> int:
    """Record the hashes of the cases, or compare with those that were."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path)
    action.add_argument("--check", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this regular expression")
    parser.add_argument("--times", action="store_true", help="print the seconds of each case")
    arguments = parser.parse_args()
    chosen = [name for name in cases() if re.search(arguments.only, name)]
    wanted = {} if arguments.check is None else read(arguments.check)
    found, failed = {}, 0
    for name in chosen:
        started = time.monotonic()
        found[name] = run_case(name)
        if arguments.times:
            print(f"{time.monotonic() - started:6.2f} s  {name}", flush=True)
        if arguments.check is not None:
            changed = differences(found[name], wanted.get(name, {}))
            failed += bool(changed)
            if changed:
                print(f"{name}: {', '.join(changed)}", flush=True)
    if arguments.write is not None:
        known = read(arguments.write) if arguments.only and arguments.write.exists() else {}
        arguments.write.write_text(json.dumps(known | found, indent=0, sort_keys=True) + "\n")
        print(f"{len(found)} cases recorded")
        return 0
    missing = [] if arguments.only else sorted(set(wanted) - set(found))
    for name in missing:
        print(f"{name}: recorded, but no longer a case")
    print(f"{len(found)} cases, {failed} differ, {len(missing)} gone")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())

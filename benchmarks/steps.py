"""Time a training step: the optimizer alone, and a whole step of a small ResNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import optax
import optax.contrib
import torch
from torch import Tensor, nn

import safe_core
from safe_core.adapters.optax import sparse_optimizer
from safe_core.adapters.torch import CapturedStep, SparseOptimizer, kernels, run
from safe_core.backends import torch_accelerator

from .devices import on_gpu, torch_device
from .peers import ForeachSAM, MinimalSAM, TwoArrayADMM
from .timing import Result, interleaved

__all__ = [
    "bytes_step",
    "give",
    "host_step",
    "jax_step",
    "resnet50_shapes",
    "torch_step",
    "whole_step",
]

INTERVAL = 32
METHOD = safe_core.safe(0.95, rho=1e-3, penalty=1e-3, dual_update_interval=INTERVAL)
# With a million steps the schedules hardly change while we time. The sparsity is constant, so that
# every step does the same work.
DERIVED = safe_core.safe(safe_core.schedules.linear_sparsity(0.95, 1, initial=0.95), steps=10**6)
BASES: dict[str, tuple[Any, dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-5, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 1e-5}),
}


def resnet50_shapes(width: int = 64) -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's 161 parameters; 25.6M entries at width 64."""
    shapes: list[tuple[int, ...]] = [(width, 3, 7, 7), (width,), (width,)]
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, outer = width * 2**stage, 4 * width * 2**stage
        for block in range(blocks):
            for out, into, side in ((inner, inputs, 1), (inner, inner, 3), (outer, inner, 1)):
                shapes += [(out, into, side, side), (out,), (out,)]
            if block == 0:
                shapes += [(outer, inputs, 1, 1), (outer,), (outer,)]
            inputs = outer
    return [*shapes, (1000, inputs), (1000,)]


Draw = Callable[[], tuple[list[nn.Parameter], list[Tensor]]]
"""Returns parameters and gradients."""


def _parameters(
    shapes: Sequence[tuple[int, ...]], device: str
) -> tuple[list[nn.Parameter], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(device) / 50) for s in shapes]
    gradients = [torch.randn(s, generator=generator).to(device) / 100 for s in shapes]
    return params, gradients


def give(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Set the gradients, as a closure does whose backward pass costs nothing.

    They are new tensors that share the memory: `SparseOptimizer` takes a closure that leaves the
    same tensors in place for one without a backward pass.
    """
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.detach()


def _plain(draw: Draw, base: Any, options: Any) -> Callable[[], None]:
    params, gradients = draw()
    optimizer = base(params, **options)

    def step() -> None:
        give(params, gradients)
        optimizer.step()

    return step


def _sam(
    draw: Draw,
    base: Any,
    options: Any,
    *,
    kind: type[MinimalSAM] = MinimalSAM,
    compiled: bool = False,
) -> Callable[[], None]:
    params, gradients = draw()
    optimizer = kind(params, base, rho=1e-3, **options)
    first, second = optimizer.first_step, optimizer.second_step
    if compiled:
        first, optimizer.base.step = torch.compile(first), torch.compile(optimizer.base.step)

    def step() -> None:
        give(params, gradients)
        first()
        give(params, gradients)
        second()

    return step


def _admm(draw: Draw, base: Any, options: Any) -> Callable[[], None]:
    params, gradients = draw()
    inner = base(params, **options)
    optimizer = TwoArrayADMM(params, inner, sparsity=0.95, penalty=1e-3, interval=INTERVAL)

    def step() -> None:
        give(params, gradients)
        optimizer.step()

    return step


def _ours(
    draw: Draw,
    base: Any,
    options: Any,
    *,
    method: safe_core.Method = METHOD,
    compiled: bool = False,
) -> Callable[[], None]:
    params, gradients = draw()
    optimizer = SparseOptimizer(
        base(params, **options), method, where=lambda name, p: p.ndim > 1, compile=compiled
    )

    def step() -> None:
        optimizer.step(lambda: give(params, gradients))

    return step


def _captured(draw: Draw, base: Any, options: Any) -> Callable[[], Any]:
    params, gradients = draw()
    settings = options if base is torch.optim.SGD else {**options, "capturable": True}
    inner = base(params, **settings)
    optimizer = SparseOptimizer(inner, METHOD, where=lambda name, p: p.ndim > 1)
    return CapturedStep(optimizer, lambda: optimizer.step(lambda: give(params, gradients)))


def torch_step(*, width: int, repeats: int, compiled: bool, gpu: bool) -> list[Result]:
    """Time the optimizer alone, in runs of 32 steps that include a dual update.

    On a GPU the baseline is SAM with foreach kernels: starting kernels for each tensor takes most
    of the time of the minimal SAM there.
    """
    draw, results = partial(_parameters, resnet50_shapes(width), torch_device()), []
    for name, (base, options) in BASES.items():
        sams = {
            f"minimal SAM + {name}": _sam(draw, base, options),
            f"foreach SAM + {name}": _sam(draw, base, options, kind=ForeachSAM),
        }
        candidates = {
            **(dict(reversed(sams.items())) if gpu else sams),
            f"safe_core + {name}": _ours(draw, base, options),
            f"safe_core, steps=T + {name}": _ours(draw, base, options, method=DERIVED),
            f"plain {name}": _plain(draw, base, options),
            f"two-array ADMM + {name}": _admm(draw, base, options),
        }
        budgets = {f"safe_core + {name}": 1.0 if gpu else 1.15}
        if compiled:
            sam = f"minimal SAM + {name}, compiled"
            candidates[sam] = _sam(draw, base, options, compiled=True)
            candidates[f"safe_core + {name}, compiled"] = _ours(draw, base, options, compiled=True)
            if not gpu:  # there `bytes_step` has the budget of the compiled step
                budgets[f"safe_core + {name}, compiled"] = 1.0
        case = "the optimizer's own time per step in PyTorch, shapes of ResNet-50"
        results += interleaved(case, candidates, repeats=repeats, calls=INTERVAL, budgets=budgets)
    return results


# Float32 arrays that a step reads or writes at least. To perturb, it reads g for the norm, then x
# and g, and writes x + e and a copy of x. To step, SGD with momentum reads the copy, g and the
# momentum, and writes x and the momentum; Adam has one more array of state.
_PASSES = {"SGD": 5 + 5, "Adam": 5 + 7}


def step_bytes(shapes: Sequence[tuple[int, ...]], base: str) -> int:
    """Return the bytes that a step must read or write, with a dual update every 32 steps.

    The penalty reads the anchor of the sparse parameters. A dual update reads x, the anchor and the
    support, and writes the anchor and the support; a support has one byte per entry.
    """
    entries = sum(math.prod(shape) for shape in shapes)
    sparse = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    return 4 * (_PASSES[base] * entries + sparse) + (3 * 4 + 2) * sparse // INTERVAL


def bytes_step(*, width: int, repeats: int, compiled: bool) -> list[Result]:
    """Time a step against copying as many bytes on the same device, in the same run."""
    shapes, results = resnet50_shapes(width), []
    draw = partial(_parameters, shapes, torch_device())
    for name, (base, options) in BASES.items():
        moved = step_bytes(shapes, name)
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=torch_device())
        copy = f"a copy that reads and writes {moved / 1e6:.4g} MB in all, the bytes of a step"
        candidates: dict[str, Callable[[], Any]] = {
            f"{copy} with {name}": partial(torch.empty_like(source).copy_, source),
            f"safe_core + {name}": _ours(draw, base, options),
        }
        ours, graph = f"safe_core + {name}, compiled", f"safe_core + {name}, a CUDA graph"
        if on_gpu():
            candidates[graph] = _captured(draw, base, options)
        if compiled:
            candidates[ours] = _ours(draw, base, options, compiled=True)
        found = interleaved(
            "a step in PyTorch against its bytes over the bandwidth, shapes of ResNet-50",
            candidates, repeats=repeats, calls=INTERVAL, budgets={ours: 1.5, graph: 1.5},
        )  # fmt: skip
        bandwidth = moved / found[0].value / 1e6
        case = "bandwidth of a copy, bytes read and written"
        results += [*found, Result(case, f"copy of {moved / 2e6:.4g} MB", bandwidth, "GB/s", 1.0)]
    return results


def _never(x: Tensor) -> bool:
    return False


def host_step(*, repeats: int) -> list[Result]:
    """Time the host's part of a step, with as many tensors as in ResNet-50 but few entries.

    It bounds the time of a step on a GPU from below. safe_core runs the code of a GPU, on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Kernels so small would wait for a second one.
    try:
        return _host_steps(repeats)
    finally:
        torch.set_num_threads(threads)


def _host_steps(repeats: int) -> list[Result]:
    draw, results = partial(_parameters, resnet50_shapes(1), "cpu"), []
    for name, (base, options) in BASES.items():
        options = {**options, "foreach": True}
        candidates = {
            f"foreach SAM + {name}": _sam(draw, base, options, kind=ForeachSAM),
            f"minimal SAM + {name}": _sam(draw, base, options),
            f"safe_core + {name}": _ours(draw, base, options),
            f"safe_core, steps=T + {name}": _ours(draw, base, options, method=DERIVED),
            f"plain {name}": _plain(draw, base, options),
        }
        case = "the host's part of a step in PyTorch: 161 tensors with few entries"
        elsewhere = {"on_host": _never}  # a mock would take longer than what is timed
        with (
            mock.patch.multiple(torch_accelerator, **elsewhere),
            mock.patch.multiple(kernels, **elsewhere),
            mock.patch.multiple(run, **elsewhere),
        ):
            results += interleaved(case, candidates, repeats=repeats, calls=INTERVAL)
    return results


def jax_step(*, width: int, repeats: int, gpu: bool) -> list[Result]:
    """Time the optimizer alone in JAX: one compiled program per step, with donated buffers."""
    # Flax kernels have the input and output axes last.
    shapes = [(*s[2:], *s[1::-1]) for s in resnet50_shapes(width)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draws = [jax.random.normal(k, s) / 50 for k, s in zip(keys, shapes, strict=True)]

    def runner(tx: Any, with_grad_fn: str | None) -> Callable[[], Any]:
        params = [x + 0 for x in draws]
        held = [params, tx.init(params)]

        def step(params: Any, state: Any, slopes: Any) -> Any:
            def grad_fn(params: Any, *_: Any) -> Any:
                return [slope + p for slope, p in zip(slopes, params, strict=True)]

            extra = {with_grad_fn: grad_fn} if with_grad_fn else {}
            updates, state = tx.update(grad_fn(params), state, params, **extra)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1))

        def run() -> Any:
            held[:] = compiled(*held, draws)
            return held[0]

        return run

    sgd = optax.sgd(1e-5, momentum=0.9)
    ours = sparse_optimizer(sgd, METHOD, where=lambda path, x: x.ndim > 1)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(1e-3))
    sam = optax.contrib.sam(sgd, ascent, opaque_mode=True)
    return interleaved(
        "a step in JAX without a model, shapes of ResNet-50",
        {
            "optax.contrib.sam + sgd": runner(sam, "grad_fn"),
            "safe_core + sgd": runner(ours, "grad_fn"),
            "optax.sgd": runner(sgd, None),
            "optax.adam": runner(optax.adam(1e-5), None),
        },
        repeats=repeats,
        calls=INTERVAL,
        budgets={"safe_core + sgd": 1.1} if gpu else None,
    )


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


class SmallResNet(nn.Module):
    """A network of six residual blocks for images of 32 by 32, with 0.27M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        plan = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.ModuleList(_block(*shape) for shape in plan)
        self.skips = nn.ModuleList(
            nn.Identity() if stride == 1 else nn.Conv2d(i, o, 1, stride) for i, o, stride in plan
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of shape (n, 3, 32, 32)."""
        x = self.stem(x)
        for block, skip in zip(self.blocks, self.skips, strict=True):
            x = torch.relu(block(x) + skip(x))
        return self.head(x.mean((2, 3)))


def whole_step(*, batch: int, repeats: int) -> list[Result]:
    """Time a whole training step of a small ResNet, with both passes."""
    device = torch_device()
    inputs = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def backward(model: nn.Module) -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()

    def sam() -> Callable[[], None]:
        model = SmallResNet().to(device)
        optimizer = MinimalSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9)

        def step() -> None:
            backward(model)
            optimizer.first_step()
            backward(model)
            optimizer.second_step()

        return step

    def ours() -> Callable[[], None]:
        model = SmallResNet().to(device)
        base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        optimizer = SparseOptimizer(base, METHOD, model=model)

        def step() -> None:
            backward(model)
            with optimizer.perturbed():
                backward(model)
            optimizer.step()

        return step

    return interleaved(
        f"a whole step of a small ResNet in PyTorch, batch {batch}",
        {"minimal SAM + SGD": sam(), "safe_core + SGD": ours()},
        repeats=repeats,
        calls=INTERVAL,
        budgets={"safe_core + SGD": 1.0},
    )

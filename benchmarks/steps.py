"""Time a training step: the optimizer alone, and a whole step of a small ResNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

from .peers import ForeachSAM, MinimalSAM, TwoArrayADMM
from .timing import Result, interleaved

__all__ = [
    "captured_step",
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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parameters(
    shapes: list[tuple[int, ...]], device: str | None = None
) -> tuple[list[nn.Parameter], list[Tensor]]:
    device = device or _device()
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


def _plain(
    shapes: Any, base: Any, options: Any, *, device: str | None = None
) -> Callable[[], None]:
    params, gradients = _parameters(shapes, device)
    optimizer = base(params, **options)

    def step() -> None:
        give(params, gradients)
        optimizer.step()

    return step


def _sam(
    shapes: Any,
    base: Any,
    options: Any,
    *,
    kind: type[MinimalSAM] = MinimalSAM,
    compiled: bool = False,
    device: str | None = None,
) -> Callable[[], None]:
    params, gradients = _parameters(shapes, device)
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


def _admm(shapes: Any, base: Any, options: Any) -> Callable[[], None]:
    params, gradients = _parameters(shapes)
    inner = base(params, **options)
    optimizer = TwoArrayADMM(params, inner, sparsity=0.95, penalty=1e-3, interval=INTERVAL)

    def step() -> None:
        give(params, gradients)
        optimizer.step()

    return step


def _ours(
    shapes: Any,
    base: Any,
    options: Any,
    *,
    method: safe_core.Method = METHOD,
    compiled: bool = False,
    device: str | None = None,
) -> Callable[[], None]:
    params, gradients = _parameters(shapes, device)
    optimizer = SparseOptimizer(
        base(params, **options), method, where=lambda name, p: p.ndim > 1, compile=compiled
    )

    def step() -> None:
        optimizer.step(lambda: give(params, gradients))

    return step


def torch_step(*, width: int, repeats: int, compiled: bool) -> list[Result]:
    """Time the optimizer alone, in runs of 32 steps that include a dual update.

    The baseline is SAM tensor by tensor on the CPU, and SAM by foreach kernels on a GPU.
    """
    shapes, results = resnet50_shapes(width), []
    on_gpu = torch.cuda.is_available()
    for name, (base, options) in BASES.items():
        sams = {
            f"minimal SAM + {name}": _sam(shapes, base, options),
            f"foreach SAM + {name}": _sam(shapes, base, options, kind=ForeachSAM),
        }
        candidates = {
            **dict(sorted(sams.items(), reverse=not on_gpu)),
            f"safe_core + {name}": _ours(shapes, base, options),
            f"safe_core, steps=T + {name}": _ours(shapes, base, options, method=DERIVED),
            f"plain {name}": _plain(shapes, base, options),
            f"two-array ADMM + {name}": _admm(shapes, base, options),
        }
        budgets = {f"safe_core + {name}": 1.0 if on_gpu else 1.15}
        if compiled:
            candidates[f"minimal SAM + {name}, compiled"] = _sam(
                shapes, base, options, compiled=True
            )
            candidates[f"safe_core + {name}, compiled"] = _ours(
                shapes, base, options, compiled=True
            )
            budgets[f"safe_core + {name}, compiled"] = 1.0
        case = "the optimizer's own time per step in PyTorch, shapes of ResNet-50"
        results += interleaved(case, candidates, repeats=repeats, calls=INTERVAL, budgets=budgets)
    return results


def captured_step(*, width: int, repeats: int) -> list[Result]:
    """Time a step on a GPU as a CUDA graph and compiled, against moving its bytes once.

    The baseline copies as many bytes as a step must read and write: with SGD and momentum, each
    entry is read for the norm (4 bytes), for the perturbation (x and the gradient are read, x + e
    and a copy of x written, 16 bytes), and for the rest (the copy, the gradient, the anchor and
    the momentum are read, x and the momentum written, 24 bytes).
    """
    if not torch.cuda.is_available():
        return []
    shapes = resnet50_shapes(width)
    base, options = BASES["SGD"]
    entries = sum(math.prod(s) for s in shapes)
    source = torch.empty(entries * 44 // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def captured() -> Callable[[], Any]:
        params, gradients = _parameters(shapes)
        inner = base(params, **options)
        optimizer = SparseOptimizer(inner, METHOD, where=lambda name, p: p.ndim > 1)
        return CapturedStep(optimizer, lambda: optimizer.step(lambda: give(params, gradients)))

    return interleaved(
        "the optimizer's own time per step on a GPU, shapes of ResNet-50, SGD",
        {
            "moving the bytes of a step": lambda: target.copy_(source),
            "foreach SAM": _sam(shapes, base, options, kind=ForeachSAM),
            "safe_core": _ours(shapes, base, options),
            "safe_core, a CUDA graph": captured(),
            "safe_core, compiled": _ours(shapes, base, options, compiled=True),
        },
        repeats=repeats,
        calls=INTERVAL,
        budgets={"safe_core, a CUDA graph": 1.5, "safe_core, compiled": 1.5},
    )


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
    shapes, results = resnet50_shapes(1), []
    for name, (base, options) in BASES.items():
        options = {**options, "foreach": True}
        candidates = {
            f"foreach SAM + {name}": _sam(shapes, base, options, kind=ForeachSAM, device="cpu"),
            f"minimal SAM + {name}": _sam(shapes, base, options, device="cpu"),
            f"safe_core + {name}": _ours(shapes, base, options, device="cpu"),
            f"safe_core, steps=T + {name}": _ours(
                shapes, base, options, method=DERIVED, device="cpu"
            ),
            f"plain {name}": _plain(shapes, base, options, device="cpu"),
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


def jax_step(*, width: int, repeats: int) -> list[Result]:
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
        budgets={"safe_core + sgd": 1.1} if jax.default_backend() != "cpu" else None,
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
    device = _device()
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

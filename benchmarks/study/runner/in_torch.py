"""Train and measure networks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from safe_core import Method
from safe_core.adapters.torch import Sassha, SparseOptimizer
from safe_core.adapters.torch.flatness import loss_surface
from safe_core.adapters.torch.modules import recalibrate, statistics_kept
from safe_core.adapters.torch.weights import prunable_weights
from safe_core.flatness import LossSurface
from safe_core.study.data import Normalisation, channels_first
from safe_core.study.models import Architecture, Variables, from_state_dict
from safe_core.study.models.torch import Normalised, build
from safe_core.study.robustness import PGD
from safe_core.study.robustness.torch import attacker

from .networks import OwnNetwork
from .plan import Plan, layer_of

__all__ = ["TorchLearner", "TorchSubject", "check", "device_name", "peak_memory"]


class TorchLearner:
    """A network trained by `SparseOptimizer`, with one closure for every method.

    Examples
    --------
    >>> from safe_core import safe
    >>> from safe_core.study.data import load
    >>> from safe_core.study.models import LeNet
    >>> from safe_core.study.runner.training import Training
    >>> training = Training(epochs=1, batch_size=8, learning_rate=0.1)
    >>> network = LeNet((4,), image=(8, 8, 1))
    >>> plan = Plan(load("digits"), network, training, safe(0.75), seed=0, augment=False)
    >>> learner = TorchLearner(plan)
    >>> _ = learner.step(*next(plan.batches(0)))
    >>> float((learner.projected(plan.method)["params"]["dense1"]["kernel"] == 0).mean()) > 0.5
    True
    """

    def __init__(self, plan: Plan, device: str = "cpu") -> None:
        self._architecture, self._device = plan.architecture, _checked(device)
        network = _initial(plan)
        self._model = Normalised(network, *plan.normalisation).to(device).train()
        self._rates = plan.rates()
        self._step = 0
        self._optimizer = _base(plan, self._model)
        self._where = _selection(plan, self._model)
        if plan.method is not None:
            self._optimizer = self._sparse(self._optimizer, plan.method)

    def _sparse(self, base: torch.optim.Optimizer, method: Method) -> SparseOptimizer:
        return SparseOptimizer(base, method, model=self._model, where=self._where)

    def step(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> Tensor:
        """Take one step on a batch; return its loss."""
        inputs, targets = _tensors(self._device, images, labels)

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = functional.cross_entropy(self._model(inputs), targets)
            # A second-order optimizer computes Hessian products, too.
            getattr(self._optimizer, "backward", Tensor.backward)(loss)
            return loss.detach()

        for group in self._optimizer.param_groups:
            group["lr"] = float(self._rates[self._step])
        self._step += 1
        return self._optimizer.step(closure)  # type: ignore[arg-type, return-value]

    def variables(self) -> Variables:
        """Return the current weights as NumPy arrays."""
        return _variables(self._architecture, self._model.model)

    def kept_by_gradient(
        self, method: Method, images: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> Variables:
        """Return the weights with the largest ``|w g|``; see `Learner.kept_by_gradient`."""
        inputs, targets = _tensors(self._device, images, labels)
        base = torch.optim.SGD(self._model.parameters(), lr=0.0)
        sparse = self._sparse(base, method).sparse_parameters()
        with statistics_kept(self._model):
            loss = functional.cross_entropy(self._model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(sparse.values()))
        squares = {name: g.square() for name, g in zip(sparse, gradients, strict=True)}
        optimizer = SparseOptimizer(
            base, method, model=self._model, where=self._where, importance=squares
        )
        with optimizer.sparse_weights():
            return self.variables()

    def projected(self, method: Method | None) -> Variables:
        """Return the weights after the final projection; see `Learner.projected`."""
        optimizer = self._optimizer
        if not isinstance(optimizer, SparseOptimizer):
            if method is None:
                return self.variables()
            base = torch.optim.SGD(self._model.parameters(), lr=0.0)
            optimizer = self._sparse(base, method)
        with optimizer.sparse_weights():
            return self.variables()


class TorchSubject:
    """A network in evaluation mode.

    Examples
    --------
    >>> from safe_core.study.data import load
    >>> from safe_core.study.models import LeNet, initial_variables
    >>> network = LeNet((4,), image=(8, 8, 1))
    >>> variables = initial_variables(network, seed=0)
    >>> subject = TorchSubject(network, load("digits").normalisation, variables)
    >>> subject.logits(np.zeros((3, 8, 8, 1), np.float32)).shape
    (3, 10)
    """

    def __init__(
        self,
        architecture: Architecture | OwnNetwork,
        normalisation: Normalisation,
        variables: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:
        self._architecture, self._device = architecture, device
        network = _built(architecture, variables)
        self._model = Normalised(network, *normalisation).to(device).eval()

    @torch.no_grad()
    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of pixels in [0, 1]."""
        (inputs,) = _tensors(self._device, images)
        found: NDArray[np.float32] = self._model(inputs).cpu().numpy()
        return found

    def recalibrated(self, batches: Sequence[NDArray[np.float32]]) -> Variables:
        """Return the variables with batch statistics recomputed over these images."""
        recalibrate(self._model, (_tensors(self._device, images)[0] for images in batches))
        return _variables(self._architecture, self._model.model)

    def surface(self, batches: Sequence[tuple[Any, Any]]) -> LossSurface:
        """Return the loss surface around the network."""

        def loss(batch: list[Tensor]) -> Tensor:
            return functional.cross_entropy(self._model(batch[0]), batch[1])

        return loss_surface(loss, self._model, [_tensors(self._device, *b) for b in batches])

    def attacked(
        self, attack: PGD, images: NDArray[np.float32], labels: NDArray[np.int64], seed: int
    ) -> NDArray[np.float32]:
        """Return adversarial images."""
        moved = attacker(self._model, attack)(*_tensors(self._device, images, labels), seed)
        return moved.cpu().numpy().transpose(0, 2, 3, 1)


def _checked(device: str) -> str:
    """Return the device if PyTorch can allocate on it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device must be available to PyTorch, got {device!r}: {reason}") from None
    return device


def _base(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
    training = plan.training
    if training.optimizer != "sgd":
        rules: dict[str, Any] = {
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
            "sassha": partial(Sassha, rho=0.0),
        }
        found: torch.optim.Optimizer = rules[training.optimizer](
            model.parameters(),
            betas=(training.momentum, training.second_moment),
            weight_decay=training.weight_decay,
            **({} if training.eps is None else {"eps": training.eps}),
        )
        return found
    return torch.optim.SGD(
        model.parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


def _selection(plan: Plan, model: Normalised) -> Callable[[str, Tensor], bool] | None:
    """Return the selection of the sparse weights; None for the default one."""
    if not plan.dense_layers:
        return None
    weights = prunable_weights(model.model)
    chosen = {name: p for name, p in model.model.named_parameters() if p in weights}
    plan.check_layers(chosen)
    sparse = {p for name, p in chosen.items() if layer_of(name) not in plan.dense_layers}
    return lambda _, p: p in sparse


def _tensors(device: str, images: Any, *labels: Any) -> list[Tensor]:
    """Return images, channels first, and labels as tensors on a device."""
    arrays = (channels_first(images), *labels)
    return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]


def _initial(plan: Plan) -> nn.Module:
    """Return the network with its initial weights."""
    if plan.start is not None:
        return _built(plan.architecture, plan.start)
    if not isinstance(plan.architecture, OwnNetwork):
        return build(plan.architecture, plan.initial_variables())
    with torch.random.fork_rng():
        torch.manual_seed(plan.weight_seed)
        made: nn.Module = plan.architecture.make(nn.Module)
    return made


def _built(architecture: Architecture | OwnNetwork, variables: Mapping[str, Any]) -> nn.Module:
    """Return the network with these weights."""
    if not isinstance(architecture, OwnNetwork):
        return build(architecture, variables)
    with torch.random.fork_rng():
        made: nn.Module = architecture.make(nn.Module)
    state = {**variables["params"], **variables.get("batch_stats", {})}
    made.load_state_dict({name: torch.from_numpy(np.asarray(x)) for name, x in state.items()})
    return made


def _variables(architecture: Architecture | OwnNetwork, network: nn.Module) -> Variables:
    state = {name: x.cpu().numpy().copy() for name, x in network.state_dict().items()}
    if not isinstance(architecture, OwnNetwork):
        return from_state_dict(architecture, state)
    trained = dict(network.named_parameters())
    return {
        "params": {name: x for name, x in state.items() if name in trained},
        "batch_stats": {name: x for name, x in state.items() if name not in trained},
    }


def check(plan: Plan, device: str) -> None:
    """Build everything that a run needs, and take no step.

    Raises
    ------
    Exception
        As the run would.
    """
    TorchLearner(plan, device)


def peak_memory(device: str) -> int | None:
    """Return the peak of the memory of a device since the last call; None for processors."""
    if torch.device(device).type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def device_name(device: str) -> str | None:
    """Return the name of an accelerator; None for processors."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None

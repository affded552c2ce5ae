"""Train and measure networks in JAX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from safe_core import Method
from safe_core.adapters.jax.flatness import loss_surface
from safe_core.adapters.jax.flax.training import recalibrate
from safe_core.adapters.jax.gradients import value_and_gradients
from safe_core.adapters.jax.weights import is_prunable, name_of
from safe_core.adapters.optax import finalize, sassha, sparse_optimizer
from safe_core.flatness import LossSurface
from safe_core.study.data import Normalisation
from safe_core.study.models import Architecture, Variables
from safe_core.study.models.flax import Network, normalised
from safe_core.study.robustness import PGD
from safe_core.study.robustness.jax import attacker

from .networks import OwnNetwork
from .plan import Plan, layer_of
from .training import Training

__all__ = ["JaxLearner", "JaxSubject", "check", "device_name", "peak_memory"]


class State(NamedTuple):
    """The state that a training step takes and returns."""

    params: Any
    statistics: Any
    optimizer: Any


class Program(NamedTuple):
    """The functions of training, compiled once for all seeds."""

    init: Callable[[Any], Any]
    step: Callable[..., tuple[State, jax.Array]]
    project: Callable[[State], Any]
    gradients: Callable[..., Any]


Net = Architecture | OwnNetwork


class JaxLearner:
    """A network trained by `sparse_optimizer`.

    Examples
    --------
    >>> from safe_core import safe
    >>> from safe_core.study.data import load
    >>> from safe_core.study.models import LeNet
    >>> training = Training(epochs=1, batch_size=8, learning_rate=0.1)
    >>> network = LeNet((4,), image=(8, 8, 1))
    >>> plan = Plan(load("digits"), network, training, safe(0.75), seed=0, augment=False)
    >>> learner = JaxLearner(plan)
    >>> _ = learner.step(*next(plan.batches(0)))
    >>> float((learner.projected(plan.method)["params"]["dense1"]["kernel"] == 0).mean()) > 0.5
    True
    """

    def __init__(self, plan: Plan, device: str = "cpu") -> None:
        self._device, self._method = _device(device), plan.method
        self._dense = plan.dense_layers
        self._program = _program(
            plan.architecture,
            plan.normalisation,
            plan.training,
            plan.method,
            plan.dense_layers,
            plan.steps_per_epoch,
        )
        with jax.default_device(self._device):
            variables = _initial(plan)
            params = variables["params"]
            plan.check_layers(_weights(params))
            self._state = State(
                params, variables.get("batch_stats", {}), self._program.init(params)
            )

    def step(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> jax.Array:
        """Take one step on a batch; return its loss."""
        with jax.default_device(self._device):
            self._state, loss = self._program.step(self._state, images, labels.astype(np.int32))
        return loss

    def variables(self) -> Variables:
        """Return the current weights as NumPy arrays."""
        return _variables(self._state.params, self._state.statistics)

    def kept_by_gradient(
        self, method: Method, images: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> Variables:
        """Return the weights with the largest ``|w g|``; see `Learner.kept_by_gradient`."""
        with jax.default_device(self._device):
            gradients = self._program.gradients(self._state, images, labels.astype(np.int32))
            params = self._state.params
            squares = jax.tree.map(jnp.square, gradients)
            where = _selection(self._dense)
            tx = sparse_optimizer(optax.identity(), method, where=where, importance=squares)
            params = finalize(params, tx.init(params), method)
        return _variables(params, self._state.statistics)

    def projected(self, method: Method | None) -> Variables:
        """Return the weights after the final projection; see `Learner.projected`."""
        with jax.default_device(self._device):
            if method is None or self._method is not None:
                params = self._program.project(self._state)
            else:
                params = _projection(method, self._dense)(self._state.params)
        return _variables(params, self._state.statistics)


@lru_cache(maxsize=4)
def _program(
    architecture: Net,
    normalisation: Normalisation,
    training: Training,
    method: Method | None,
    dense_layers: tuple[str, ...],
    steps_per_epoch: int,
) -> Program:
    count = training.epochs * steps_per_epoch
    table = np.asarray([training.rate(step, steps_per_epoch) for step in range(count)])

    def rate(step: Any) -> jax.Array:
        return jnp.asarray(table)[step]

    tx: Any = _base(training, rate)
    if method is not None:
        needs_rate = method.plan().needs_learning_rate  # for a decoupled penalty
        learning_rate = rate if needs_rate else None
        tx = sparse_optimizer(
            tx, method, learning_rate=learning_rate, where=_selection(dense_layers)
        )
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params: Any, batch: Any, statistics: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        logits, after = _train_logits(architecture, normalisation, params, statistics, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, images: Any, labels: Any) -> tuple[State, jax.Array]:
        (loss, statistics), gradients, grad_fn = value_and_gradients(loss_fn, has_aux=True)(
            state.params, (images, labels), state.statistics
        )
        updates, optimizer = tx.update(gradients, state.optimizer, state.params, grad_fn=grad_fn)
        return State(optax.apply_updates(state.params, updates), statistics, optimizer), loss

    def project(state: State) -> Any:
        return state.params if method is None else finalize(state.params, state.optimizer, method)

    def gradients(state: State, images: Any, labels: Any) -> Any:
        return jax.grad(loss_fn, has_aux=True)(state.params, (images, labels), state.statistics)[0]

    return Program(jax.jit(tx.init), step, jax.jit(project), jax.jit(gradients))


def _base(training: Training, rate: Callable[[Any], jax.Array]) -> optax.GradientTransformation:
    averages = {"b1": training.momentum, "b2": training.second_moment}
    if training.eps is not None:
        averages["eps"] = training.eps
    if training.optimizer == "sassha":
        options: dict[str, Any] = {**averages, "weight_decay": training.weight_decay}
        return sassha(rate, rho=0.0, **options)
    if training.optimizer == "adamw":
        return optax.adamw(rate, **averages, weight_decay=training.weight_decay)
    if training.optimizer == "adam":
        rule = optax.adam(rate, **averages)
    else:
        rule = optax.sgd(rate, momentum=training.momentum or None)
    return optax.chain(optax.add_decayed_weights(training.weight_decay), rule)


def _selection(dense_layers: tuple[str, ...]) -> Callable[[str, Any], bool] | None:
    """Return the selection of the sparse weights; None for the default one."""
    if not dense_layers:
        return None
    return lambda path, leaf: is_prunable(path, leaf) and layer_of(path) not in dense_layers


def _weights(params: Any) -> list[str]:
    """Return the paths of the weights that a method prunes by default."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [(name_of(path), leaf) for path, leaf in leaves]
    return [name for name, leaf in named if is_prunable(name, leaf)]


@lru_cache(maxsize=16)
def _projection(method: Method, dense_layers: tuple[str, ...]) -> Callable[[Any], Any]:
    """Return the compiled final projection of a method that does nothing before it."""
    tx = sparse_optimizer(optax.identity(), method, where=_selection(dense_layers))
    return jax.jit(lambda params: finalize(params, tx.init(params), method))


class JaxSubject:
    """A network in evaluation mode.

    Examples
    --------
    >>> from safe_core.study.data import load
    >>> from safe_core.study.models import LeNet, initial_variables
    >>> network = LeNet((4,), image=(8, 8, 1))
    >>> variables = initial_variables(network, seed=0)
    >>> subject = JaxSubject(network, load("digits").normalisation, variables)
    >>> subject.logits(np.zeros((3, 8, 8, 1), np.float32)).shape
    (3, 10)
    """

    def __init__(
        self,
        architecture: Net,
        normalisation: Normalisation,
        variables: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:
        self._architecture, self._normalisation = architecture, normalisation
        self._device = _device(device)
        with jax.default_device(self._device):
            self._variables = jax.tree.map(jnp.asarray, dict(variables))

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of pixels in [0, 1]."""
        with jax.default_device(self._device):
            program = _evaluation(self._architecture, self._normalisation)
            return np.asarray(program(images, self._variables))

    def recalibrated(self, batches: Sequence[NDArray[np.float32]]) -> Variables:
        """Return the variables with batch statistics recomputed over these images."""
        params = self._variables["params"]
        statistics = self._variables.get("batch_stats", {})
        if not statistics:
            return _variables(params, statistics)

        def update(statistics: Any, images: Any) -> Any:
            return _train_logits(
                self._architecture, self._normalisation, params, statistics, images
            )[1]

        with jax.default_device(self._device):
            return _variables(params, recalibrate(update, statistics, batches))

    def surface(self, batches: Sequence[tuple[Any, Any]]) -> LossSurface:
        """Return the loss surface around the network."""
        forward = _evaluation(self._architecture, self._normalisation)
        fixed = {name: x for name, x in self._variables.items() if name != "params"}

        def loss(params: Any, batch: Any) -> jax.Array:
            logits = forward(batch[0], {"params": params, **fixed})
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        with jax.default_device(self._device):
            held = [(images, labels.astype(np.int32)) for images, labels in batches]
            return loss_surface(loss, self._variables["params"], held)

    def attacked(
        self, attack: PGD, images: NDArray[np.float32], labels: NDArray[np.int64], seed: int
    ) -> NDArray[np.float32]:
        """Return adversarial images."""
        with jax.default_device(self._device):
            fool = _attacker(self._architecture, self._normalisation, attack)
            return np.asarray(fool(images, labels.astype(np.int32), seed, self._variables))


@lru_cache(maxsize=4)
def _evaluation(architecture: Net, normalisation: Normalisation) -> Callable[..., Any]:
    """Return the compiled function ``(images, variables) -> logits``."""

    def logits(images: Any, variables: Any) -> Any:
        return _applied(architecture, variables, images, train=False)[0]

    return jax.jit(normalised(logits, *normalisation))


@lru_cache(maxsize=8)
def _attacker(architecture: Net, normalisation: Normalisation, attack: PGD) -> Callable[..., Any]:
    return attacker(_evaluation(architecture, normalisation), attack)


def _train_logits(
    architecture: Net,
    normalisation: Normalisation,
    params: Any,
    statistics: Any,
    images: Any,
) -> tuple[jax.Array, Any]:
    """Return the logits in training mode, and the new batch statistics."""

    def forward(images: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        return _applied(architecture, variables, images, train=True)

    logits, after = normalised(forward, *normalisation)(images)
    return logits, after.get("batch_stats", {})


def _applied(architecture: Net, variables: Any, images: Any, *, train: bool) -> tuple[Any, Any]:
    """Return the logits, and the collections that training changes."""
    network = _network(architecture)
    mode = {"train": train} if "train" in inspect.signature(network.__call__).parameters else {}
    if train:
        found: tuple[Any, Any] = network.apply(variables, images, mutable=["batch_stats"], **mode)
        return found
    return network.apply(variables, images, **mode), {}


def _network(architecture: Net) -> Any:
    if isinstance(architecture, OwnNetwork):
        return architecture.make(flax.linen.Module)
    return Network(architecture)


def _initial(plan: Plan) -> Any:
    """Return the initial variables on the default device."""
    if plan.start is not None:
        return jax.tree.map(jnp.asarray, dict(plan.start))
    network = plan.architecture
    if not isinstance(network, OwnNetwork):
        return jax.tree.map(jnp.asarray, plan.initial_variables())
    module = _network(network)
    mode = {"train": False} if "train" in inspect.signature(module.__call__).parameters else {}
    images = jnp.zeros((2, *network.image), jnp.float32)
    found = module.init(jax.random.key(plan.weight_seed), images, **mode)
    return {name: found[name] for name in ("params", "batch_stats") if name in found}


def check(plan: Plan, device: str) -> None:
    """Trace everything that a run needs, and take no step.

    Raises
    ------
    Exception
        As the run would.
    """
    with jax.default_device(_device(device)):
        program = _program(
            plan.architecture,
            plan.normalisation,
            plan.training,
            plan.method,
            plan.dense_layers,
            plan.steps_per_epoch,
        )
        params = _initial(plan)["params"]
        plan.check_layers(_weights(params))
        jax.eval_shape(program.init, params)


def peak_memory(device: str) -> int | None:
    """Return the peak of the memory of a device in this process; None for processors."""
    found = _device(device).memory_stats() or {}
    peak: int | None = found.get("peak_bytes_in_use")
    return peak


def device_name(device: str) -> str | None:
    """Return the name of an accelerator; None for processors."""
    found = _device(device)
    return None if found.platform == "cpu" else str(found.device_kind)


def _device(name: str) -> Any:
    """Return the JAX device for a name such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
    kind, _, number = name.partition(":")
    try:
        return jax.devices(kind)[int(number or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"device must be available to JAX, got {name!r}: {error}") from None


def _variables(params: Any, statistics: Any) -> Variables:
    found = {"params": params, **({"batch_stats": statistics} if statistics else {})}
    # Copy, because the next step donates the buffers.
    return jax.tree.map(lambda x: np.array(x), found)

"""Time a model and its linear layers in the forms of PyTorch, with synthetic zeros."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safe_core._synthetic import synthetic_2_of_4, synthetic_weight
from safe_core.adapters.export_forms import OWN, Sparsity, channel_share
from safe_core.adapters.export_measurements import Collected, Totals, own_times, stored_bytes
from safe_core.adapters.layer_timing import interleaved
from safe_core.compressed.forms import chosen_form
from safe_core.finalization import listed

from .channels import shrink, silence_channels
from .compressed import raw_tensor
from .sparse_layers import SparseLinear, sparse_forms
from .sparse_model import READERS, MeasuredLayers, timed_call
from .weights import prunable_weights

__all__ = ["LinearCall", "measure_layers", "measure_whole", "smaller_models", "state_bytes"]

Call = Callable[[nn.Module], Any]

_HALF = 0.5  # zeros of 2:4
_SUMMED = (
    "CSR, BSR and 2:4: the time of the dense model, less what its linear layers save that get a "
    "tenth faster; layers of equal shapes were measured once"
)

_CHANNELS = (
    "channels removed: of each layer the share that leaves as few weights between two layers, "
    "such as Channel(0.553) for 80%"
)


class LinearCall(NamedTuple):
    """A call of a linear layer.

    Attributes
    ----------
    outputs, inputs : int
    bias : bool
    rows : int
        Rows of the inputs.
    """

    outputs: int
    inputs: int
    bias: bool
    rows: int


class _Shapes:
    """The linear layers that can be pruned, and their calls."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.weights: list[Tensor] = []
        self.calls: Counter[LinearCall] = Counter()
        known = prunable_weights(model)
        inside = {id(m) for reader in model.modules() if isinstance(reader, READERS)
                  for m in reader.modules()}  # fmt: skip
        hooks = []
        for module in model.modules():
            weight = module._parameters.get("weight")
            if type(module) is nn.Linear and weight in known and id(module) not in inside:
                assert weight is not None
                self.weights.append(weight)
                hooks.append(module.register_forward_pre_hook(self._count, with_kwargs=True))
        try:
            call(model)
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, module: nn.Linear, given: Any, named: Any) -> None:
        x: Tensor = given[0] if given else named["input"]
        rows = x.numel() // module.in_features
        bias = module.bias is not None
        self.calls[LinearCall(module.out_features, module.in_features, bias, rows)] += 1


def smaller_models(found: Collected, model: nn.Module, inputs: Any) -> dict[Sparsity, nn.Module]:
    """Return copies of a model without some of their channels, or note why there are none."""
    if "channels" not in found.plan.forms:
        return {}
    smaller: dict[Sparsity, nn.Module] = {}
    at: list[Sparsity] = [*found.plan.sparsities, *([OWN] if found.plan.own else [])]
    for sparsity in at:
        trial = copy.deepcopy(model)
        if not isinstance(sparsity, str):
            _zero_channels(trial, channel_share(sparsity))
        try:
            silence_channels(trial, inputs)
            removed = shrink(trial, inputs)
        except (ModuleNotFoundError, ValueError) as error:
            if sparsity != OWN:
                found.miss(["channels"], str(error))
            continue
        if removed.removed:
            smaller[sparsity] = trial
            found.note(_CHANNELS)
        elif sparsity != OWN:
            reasons = "; ".join(dict.fromkeys(removed.kept.values())) or "there are none"
            found.miss(["channels"], f"no channels can be removed: {reasons}")
    return smaller


def _zero_channels(model: nn.Module, share: float) -> None:
    """Fill the layers with random weights of which some output channels are zero."""
    known = prunable_weights(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight in known and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            assert weight is not None
            rest = weight[0].numel()
            values = synthetic_weight((len(weight), rest), (1, rest), share)
            weight.copy_(torch.from_numpy(values).reshape(weight.shape))


def measure_whole(
    found: Collected,
    batch: int | None,
    model: nn.Module,
    smaller: Mapping[Sparsity, nn.Module],
    call: Call,
    device: torch.device,
) -> None:
    """Time a dense model, and those with fewer channels."""
    models: dict[Sparsity, nn.Module] = {0.0: model, **smaller}
    runs = {str(at): timed_call(call, each, device) for at, each in models.items()}
    taken = interleaved(runs, found.plan.repeats, clock(device))
    for at, each in models.items():
        form = "channels" if at else "dense"
        found.add(form, batch, at, statistics.median(taken[str(at)]), state_bytes(each))


def measure_layers(
    found: Collected, batch: int | None, model: nn.Module, call: Call, device: torch.device
) -> None:
    """Time the linear layers in CSR, BSR and 2:4, after the dense model."""
    wanted = [form for form in ("csr", "bsr", "2:4") if form in found.plan.forms]
    if not wanted:
        return
    shapes = _Shapes(model, call)
    totals = Totals(found.seconds["dense"][batch][0.0])
    for shape, count in shapes.calls.items():
        totals.add(count, _times(found, shape, model, device))
    for (form, at), seconds in totals.seconds():
        found.add(form, batch, at, seconds, _size(model, shapes.weights, float(at), form))
    if totals.forms:
        found.note(_SUMMED)
    measured = {id(p) for p in shapes.weights}
    known = prunable_weights(model)
    dense = [n for n, p in model.named_parameters() if p in known and id(p) not in measured]
    if dense:
        found.note(
            "CSR, BSR and 2:4: weights stay dense that are not of a torch.nn.Linear, or that "
            f"attention reads itself: {listed(dense)}"
        )
    if found.plan.own is not None:
        _measure_own(found, batch, model, call, device, wanted)


def _times(
    found: Collected, shape: LinearCall, model: nn.Module, device: torch.device
) -> dict[tuple[str, Sparsity], float]:
    dtype = next(p.dtype for p in prunable_weights(model))
    x = torch.randn(shape.rows, shape.inputs, dtype=dtype, device=device)
    layer = nn.Linear(shape.inputs, shape.outputs, shape.bias, dtype=dtype, device=device)
    runs: dict[tuple[str, Sparsity], Callable[[], None]] = {
        ("dense", 0.0): timed_call(lambda m: m(x), layer, device)
    }
    for form, at, make in _synthetic(found, shape, layer):
        try:
            run = timed_call(lambda m: m(x), make(), device)
            run()
        except RuntimeError as error:  # the dtype, or the shape on CUDA
            found.miss([form], str(error).splitlines()[0])
        else:
            runs[form, at] = run
    taken = interleaved(
        {f"{form} {at}": run for (form, at), run in runs.items()},
        found.plan.repeats,
        clock(device),
    )
    return {key: statistics.median(taken[f"{key[0]} {key[1]}"]) for key in runs}


def _synthetic(
    found: Collected, shape: LinearCall, layer: nn.Linear
) -> Iterator[tuple[str, float, Callable[[], SparseLinear]]]:
    """Yield the forms that fit a layer, with sparsities and functions that make them."""
    size = shape.outputs, shape.inputs

    def forms(values: Any) -> dict[str, Callable[[], SparseLinear]]:
        changed = copy.deepcopy(layer)
        changed.weight.copy_(torch.from_numpy(values))
        return dict(sparse_forms(changed))

    plan = found.plan
    if layer.weight.device.type == "cuda":
        if "2:4" in plan.forms and shape.inputs % 4 == 0:
            yield "2:4", _HALF, forms(synthetic_2_of_4(size))["2:4"]
        return
    for sparsity in plan.sparsities:
        if "csr" in plan.forms:
            yield "csr", sparsity, forms(synthetic_weight(size, (1, 1), sparsity))["CSR"]
        if "bsr" in plan.forms and not (shape.outputs % 16 or shape.inputs % 16):
            made = forms(synthetic_weight(size, (16, 16), sparsity))
            if "BSR 16x16" in made:
                yield "bsr", sparsity, made["BSR 16x16"]


def _measure_own(
    found: Collected,
    batch: int | None,
    model: nn.Module,
    call: Call,
    device: torch.device,
    wanted: list[str],
) -> None:
    """Time the linear layers with the zeros that they have."""
    measured = MeasuredLayers(model, found.plan.repeats, clock(device))
    try:
        call(model)
    finally:
        measured.remove_hooks()
    totals = Totals(found.seconds["dense"][batch][0.0])
    for layer in measured.layers_timed():
        if layer.seconds:
            totals.add(1, own_times(layer))
    own = {form: seconds for (form, _), seconds in totals.seconds() if form in wanted}
    if own:
        size = sum(chosen_form(raw_tensor(x)).nbytes for x in _tensors(model))
        for form, seconds in own.items():
            found.add(form, batch, OWN, seconds, size)


def _size(model: nn.Module, weights: list[Tensor], sparsity: float, form: str) -> int:
    """Return the bytes of a compressed file with synthetic zeros in some weights."""
    total = state_bytes(model)
    for p in weights:
        kept = p.numel() - math.floor(sparsity * p.numel())
        width = p.element_size()
        size = stored_bytes(p.numel(), kept, width, in_2_of_4=form == "2:4")
        total += size - p.numel() * width
    return total


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of the tensors of a model, those that are shared once."""
    return sum(x.numel() * x.element_size() for x in _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return list({(x.data_ptr(), x.shape): x for x in model.state_dict().values()}.values())


def clock(device: torch.device) -> Callable[[], float]:
    """Return the clock for one thread of the CPU, or for a GPU."""
    exact = time.get_clock_info("process_time").resolution < 1e-6
    return time.process_time if device.type == "cpu" and exact else time.perf_counter

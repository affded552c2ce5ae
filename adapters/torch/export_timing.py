"""Time a model and its linear layers in the forms of PyTorch, with synthetic zeros."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safe_core._synthetic import synthetic_2_of_4, synthetic_weight
from safe_core.adapters.export_forms import FORMS, OWN, Sparsity, channel_share, percent
from safe_core.adapters.export_measurements import Collected, first_line, measure_own
from safe_core.adapters.export_sums import SummedTimes, summed, zeroed_bytes
from safe_core.adapters.layer_timing import interleaved
from safe_core.adapters.memory_errors import lacks_memory
from safe_core.compressed.forms import chosen_form
from safe_core.finalization import listed

from .channels import shrink, silence_channels
from .compressed import raw_tensor
from .sparse_layers import SparseLinear, sparse_forms
from .sparse_model import READERS, MeasuredLayers, timed_call
from .weights import prunable_weights

__all__ = [
    "LinearCall",
    "compressed_bytes",
    "measure_layers",
    "measure_whole",
    "smaller_models",
    "state_bytes",
]

Call = Callable[[nn.Module], Any]

_HALF = 0.5  # zeros of 2:4
_CHANNELS = (
    "channels removed: each layer loses the share of channels that leaves the stated fraction of "
    "weights between two layers, such as {} for {}."
)
# Why layers stay dense in a form whose groups do not fit.
_UNFIT = {
    "bsr": "BSR 16x16: {} of {} layers stay dense, because their shape is not a multiple of 16: {}",
    "2:4": "2:4: {} of {} layers stay dense, because their number of inputs is not a multiple of "
           "4: {}",
}  # fmt: skip


class LinearCall(NamedTuple):
    """A call of a linear layer.

    Attributes
    ----------
    outputs, inputs : int
    bias : bool
    rows : int
        Rows of the inputs.
    dtype : torch.dtype
        That of the weight.
    """

    outputs: int
    inputs: int
    bias: bool
    rows: int
    dtype: torch.dtype


class _Shapes:
    """The linear layers that can be pruned, and their calls."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.weights: dict[int, tuple[str, Tensor]] = {}  # by identity, tied ones once
        self.calls: Counter[LinearCall] = Counter()
        known = prunable_weights(model)
        inside = {id(m) for reader in model.modules() if isinstance(reader, READERS)
                  for m in reader.modules()}  # fmt: skip
        hooks = []
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if type(module) is nn.Linear and weight in known and id(module) not in inside:
                assert weight is not None
                self.weights.setdefault(id(weight), (f"{name}.weight".lstrip("."), weight))
                hooks.append(module.register_forward_pre_hook(self._count, with_kwargs=True))
        try:
            call(model)
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, module: nn.Linear, given: Any, named: Any) -> None:
        x: Tensor = given[0] if given else named["input"]
        rows = x.numel() // module.in_features
        bias, dtype = module.bias is not None, module.weight.dtype
        size = module.out_features, module.in_features
        self.calls[LinearCall(*size, bias, rows, dtype)] += 1

    def fitting(self, form: str) -> list[Tensor]:
        """Return the weights whose shape is a multiple of the groups of a form."""
        return [p for _, p in self.weights.values() if _fits(form, p.shape)]

    def unfit(self, form: str) -> list[str]:
        """Return the names of the others."""
        return [name for name, p in self.weights.values() if not _fits(form, p.shape)]


def _fits(form: str, shape: Sequence[int]) -> bool:
    unit = FORMS[form].unit or (1, 1)
    return not any(n % size for n, size in zip(shape, unit, strict=True))


def smaller_models(found: Collected, model: nn.Module, inputs: Any) -> dict[Sparsity, nn.Module]:
    """Return copies of a model without some of their channels, or note why there are none."""
    if "channels" not in found.plan.forms:
        return {}
    smaller: dict[Sparsity, nn.Module] = {}
    at: list[Sparsity] = [*found.plan.sparsities, *([OWN] if found.plan.own else [])]
    for sparsity in at:
        own = isinstance(sparsity, str)
        place = "its own zeros" if isinstance(sparsity, str) else f"{percent(sparsity)} zeros"
        try:
            trial = copy.deepcopy(model)
            if not isinstance(sparsity, str):
                _zero_channels(trial, channel_share(sparsity))
            silence_channels(trial, inputs)
            removed = shrink(trial, inputs)
        except (ModuleNotFoundError, RuntimeError, TypeError, ValueError) as error:
            if lacks_memory(error):
                raise
            if not own:
                found.not_measured(["channels"], first_line(error), place)
            continue
        if removed.removed:
            smaller[sparsity] = trial
            least = found.plan.sparsities[0]
            found.note(_CHANNELS.format(f"Channel({channel_share(least):.3g})", percent(least)))
        elif not own:
            reasons = "; ".join(removed.reasons) or "there are none"
            text = f"no channels can be removed: {reasons}"
            found.not_measured(["channels"], text, place)
        if removed.removed and not own:
            for reason, names in removed.reasons.items():
                found.note(
                    f"channels removed: leave out {listed(names)} with where=, because zero "
                    f"channels stay there: {reason}"
                )
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
    totals = SummedTimes(found.seconds["dense"][batch][0.0])
    for shape, count in shapes.calls.items():
        totals.add(count, _times(found, shape, device))
    dense_size = state_bytes(model)
    for (form, at), seconds in totals.seconds():
        weights = [(p.numel(), p.element_size()) for p in shapes.fitting(form)]
        size = zeroed_bytes(dense_size, weights, float(at), in_2_of_4=form == "2:4")
        found.add(form, batch, at, seconds, size)
    if totals.forms:
        found.note(summed("CSR, BSR and 2:4 are estimates"))
    for form in dict.fromkeys(form for form, _ in totals.forms):
        if form in _UNFIT and (unfit := shapes.unfit(form)):
            found.note(_UNFIT[form].format(len(unfit), len(shapes.weights), listed(unfit)))
    known = prunable_weights(model)
    dense = [n for n, p in model.named_parameters() if p in known and id(p) not in shapes.weights]
    if dense:
        found.note(
            "CSR, BSR and 2:4: these weights stay dense, because they do not belong to a "
            f"torch.nn.Linear or an attention module reads them directly: {listed(dense)}"
        )
    if found.plan.own is not None:
        _measure_own(found, batch, model, call, device, wanted)


def _times(
    found: Collected, shape: LinearCall, device: torch.device
) -> dict[tuple[str, Sparsity], float]:
    placed: dict[str, Any] = {"dtype": shape.dtype, "device": device}
    x = torch.randn(shape.rows, shape.inputs, **placed)
    layer = nn.Linear(shape.inputs, shape.outputs, shape.bias, **placed)
    runs: dict[tuple[str, Sparsity], Callable[[], None]] = {
        ("dense", 0.0): timed_call(lambda m: m(x), layer, device)
    }
    for form, at, make in _synthetic(found, shape, layer):
        try:
            run = timed_call(lambda m: m(x), make(), device)
            run()
        except RuntimeError as error:  # the dtype, or the shape on CUDA
            if lacks_memory(error):
                raise
            found.not_measured(
                [form],
                first_line(error),
                f"{percent(at)} zeros in {_size(shape)} and {shape.rows} rows",
            )
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
        if "2:4" in plan.forms and _fits("2:4", size):
            yield "2:4", _HALF, forms(synthetic_2_of_4(size))["2:4"]
        return
    for sparsity in plan.sparsities:
        if "csr" in plan.forms:
            yield "csr", sparsity, forms(synthetic_weight(size, (1, 1), sparsity))["CSR"]
        if "bsr" in plan.forms and _fits("bsr", size):
            made = forms(synthetic_weight(size, (16, 16), sparsity))
            if "BSR 16x16" in made:
                yield "bsr", sparsity, made["BSR 16x16"]
            else:
                text = "more than half of the blocks are not zero, so the layers stay dense"
                found.not_measured(["bsr"], text, f"{percent(sparsity)} zeros in {_size(shape)}")


def _size(shape: LinearCall) -> str:
    return f"a layer of {shape.inputs} inputs, {shape.outputs} outputs"


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
    measure_own(found, batch, wanted, measured.layers_timed())


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of the tensors of a model, those that are shared once."""
    return sum(x.numel() * x.element_size() for x in _tensors(model))


def compressed_bytes(model: nn.Module) -> int:
    """Return the bytes of a compressed file with the zeros that a model has."""
    return sum(chosen_form(raw_tensor(x)).nbytes for x in _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    # Extra state of a module may be anything.
    tensors = [x for x in model.state_dict().values() if isinstance(x, Tensor)]
    return list({(x.data_ptr(), x.shape): x for x in tensors}.values())


def clock(device: torch.device) -> Callable[[], float]:
    """Return the clock for one thread of the CPU, or for a GPU."""
    exact = time.get_clock_info("process_time").resolution < 1e-6
    return time.process_time if device.type == "cpu" and exact else time.perf_counter

"""Check what is said about weights that stay dense, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from short_runs import short_run
from torch import nn
from torch.nn.utils import parametrizations, prune

import safe_core
from safe_core import DenseWeightWarning
from safe_core.adapters.torch import SparseOptimizer

METHOD = safe_core.safe(0.5)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


class Scale(nn.Module):
    """A layer of one's own: a matrix, a vector, a class token and a stack of biases."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        return (x + self.token) @ self.matrix * self.vector


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm((2, 4), bias=False), nn.Linear(8, 4), Scale()
    )


def rows(optimizer):
    return {w.name: (w.reason, w.expected) for w in optimizer.coverage().weights}


# Coverage


def test_a_matrix_of_an_unknown_module_is_warned_of():
    model = network()
    with pytest.warns(DenseWeightWarning) as seen:
        optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    (warning,) = seen
    assert str(warning.message).startswith(
        "1 of 4 weights stay dense: 3.matrix, because model= does not know the type of the module."
    )
    assert warning.filename == __file__
    assert rows(optimizer) == {
        "0.weight": ("", True),
        "1.weight": ("normalisation layers stay dense", True),
        "2.weight": ("", True),
        "3.matrix": ("model= does not know the type of the module", False),
    }
    line = "sparse: 2 of 4 weights, 64 of 88 entries; dense: 1.weight, because normalisation"
    assert line in repr(optimizer)
    assert line in str(optimizer.coverage())


@pytest.mark.parametrize("sparsify", [True, False])
def test_a_choice_for_the_group_silences_the_warning(sparsify):
    model = network()
    own, rest = [*model[3].parameters()], [*model[:3].parameters()]
    groups = [{"params": rest}, {"params": own, "sparsify": sparsify}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SparseOptimizer(sgd(groups), METHOD, model=model)
    assert ("3.matrix" in optimizer.sparse_parameters()) is sparsify
    assert "3.vector" not in optimizer.sparse_parameters()


def test_where_silences_the_warning():
    model = network()
    optimizer = SparseOptimizer(
        sgd(model.parameters()), METHOD, model=model, where=lambda name, p: name == "0.weight"
    )
    assert rows(optimizer)["3.matrix"] == ("where= said False", True)
    assert rows(optimizer)["2.weight"] == ("where= said False", True)


def test_weights_that_the_base_does_not_hold_are_warned_of():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Embedding(3, 4))
    reason = r"0\.weight, because base does not hold the parameter"
    with pytest.warns(DenseWeightWarning, match=reason):
        optimizer = SparseOptimizer(sgd(model[1].parameters()), METHOD, model=model)
    assert "sparse: 1 of 3 weights, 32 of 76 entries" in repr(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": model[0].parameters()})
    assert "sparse: 2 of 3 weights, 64 of 76 entries" in repr(optimizer)


def test_where_is_asked_about_weights_that_the_base_does_not_hold():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    base = sgd(model[1].parameters())
    with pytest.warns(DenseWeightWarning, match=r"0\.weight, because base does not hold"):
        SparseOptimizer(base, METHOD, model=model, where=lambda name, p: p.ndim == 2)
    optimizer = SparseOptimizer(base, METHOD, model=model, where=lambda name, p: name == "1.weight")
    assert optimizer.coverage().unexpected == ()


def test_frozen_weights_are_warned_of_even_if_chosen():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    for options in ({"model": model}, {"where": lambda name, p: p.ndim == 2}):
        with pytest.warns(DenseWeightWarning, match="because requires_grad is False"):
            SparseOptimizer(sgd(model.parameters()), METHOD, **options)


def test_a_new_group_is_warned_of_alone():
    model = network()
    base = sgd(model[0].parameters())
    with pytest.warns(DenseWeightWarning, match="2 of 4 weights stay dense: 2.weight, 3.matrix"):
        optimizer = SparseOptimizer(base, METHOD, model=model)
    with pytest.warns(DenseWeightWarning, match=r"1 of 1 weights stay dense: 3\.matrix"):
        optimizer.add_param_group({"params": model[3].parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": model[2].parameters()})


def test_many_weights_of_one_reason_are_counted():
    model = nn.Sequential(nn.Linear(4, 4), *[Scale() for _ in range(40)])
    with pytest.warns(DenseWeightWarning) as seen:
        SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    assert "1.matrix, 2.matrix, 3.matrix and 37 more, because" in str(seen[0].message)


def test_a_weight_that_is_a_buffer_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    fixed = model[0].weight.detach().clone()
    del model[0].weight
    model[0].register_buffer("weight", fixed)
    with pytest.warns(DenseWeightWarning, match=r"0\.weight, because the weight is not a param"):
        SparseOptimizer(sgd(model.parameters()), METHOD, model=model)


def test_coverage_without_a_model_is_that_of_the_base():
    model = network()
    groups = [
        {"params": list(model[0].named_parameters()), "sparsify": True},
        {"params": list(model[3].named_parameters())},
    ]
    optimizer = SparseOptimizer(sgd(groups), METHOD)
    assert rows(optimizer) == {
        "weight": ("", True),
        "matrix": ('"sparsify" is not set on the param group', True),
    }


def test_coverage_survives_a_copy():
    model = network()
    with pytest.warns(DenseWeightWarning):
        optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    assert copy.deepcopy(optimizer).coverage() == optimizer.coverage()


# Layers that compute their weight


def masked(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


HIDDEN = {
    "prune": (masked, r"prune masks 0\.weight: call torch.nn.utils.prune.remove"),
    "old weight norm": (torch.nn.utils.weight_norm, r"0\.weight: call .*remove_weight_norm"),
    "old spectral norm": (torch.nn.utils.spectral_norm, r"or remove_spectral_norm"),
    "weight norm": (parametrizations.weight_norm, r"0\.weight: call .*remove_parametrizations"),
    "spectral norm": (parametrizations.spectral_norm, r"its layer computes 0\.weight"),
    "orthogonal": (parametrizations.orthogonal, r"its layer computes 0\.weight"),
}


@pytest.fixture(params=HIDDEN)
def hidden(request):
    hide, message = HIDDEN[request.param]
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older forms are deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        hide(model[0])
    return model, message


@pytest.mark.parametrize("options", [{}, {"where": lambda name, p: p.ndim > 1}])
def test_a_layer_that_computes_its_weight_is_refused(hidden, options):
    """Zeros of the parameters it is computed from are not those of the weight."""
    model, message = hidden
    with pytest.raises(ValueError, match=message):
        SparseOptimizer(sgd(model.parameters()), METHOD, model=model, **options)


def test_such_a_layer_may_be_left_dense(hidden):
    model, _ = hidden
    groups = [
        {"params": model[0].parameters(), "sparsify": False},
        {"params": model[1].parameters()},
    ]
    where = {"where": lambda name, p: name == "1.weight"}
    for base, options in ((sgd(groups), {}), (sgd(model.parameters()), where)):
        optimizer = SparseOptimizer(base, METHOD, model=model, **options)
        assert list(optimizer.sparse_parameters()) == ["1.weight"]


def test_such_a_layer_outside_the_base_is_warned_of(hidden):
    model, _ = hidden
    with pytest.warns(DenseWeightWarning, match="base does not hold"):
        SparseOptimizer(sgd(model[1].parameters()), METHOD, model=model)


def test_a_masked_recurrent_layer_is_refused():
    model = nn.LSTM(4, 6, bidirectional=True)
    prune.l1_unstructured(model, "weight_ih_l0", 0.5)
    with pytest.raises(ValueError, match=r'weight_ih_l0: call .*remove\(layer, "weight_ih_l0"\)'):
        SparseOptimizer(sgd(model.parameters()), METHOD, model=model)


def test_a_parametrized_embedding_stays_dense_without_a_warning():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    parametrizations.weight_norm(model[0])
    optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    assert list(optimizer.sparse_parameters()) == ["1.weight"]


# Options of groups


@short_run
def test_true_on_a_group_selects_matrices_of_any_module():
    model = network()
    own, rest = [*model[3].parameters()], [*model[:3].parameters()]
    groups = [{"params": rest}, {"params": own, "sparsify": True, "sparsity": 0.25}]
    optimizer = SparseOptimizer(sgd(groups), METHOD, model=model)
    assert list(optimizer.sparse_parameters()) == ["0.weight", "2.weight", "3.matrix", "3.token"]
    optimizer.finalize()
    assert int((model[3].matrix == 0).sum() + (model[3].token == 0).sum()) == 5


@short_run
def test_true_on_a_group_uses_the_layouts_of_model_and_layout():
    model = network()
    groups = [
        {"params": [model[0].weight, model[3].matrix], "sparsify": True},
        {"params": [model[2].weight]},
    ]
    method = safe_core.safe("2:4")
    with pytest.raises(ValueError, match=r"layout of 3\.matrix is unknown"):
        SparseOptimizer(sgd(groups), method, model=model)
    layout = {"3.matrix": safe_core.Layout(input_axes=(0,), output_axes=(1,))}
    optimizer = SparseOptimizer(sgd(groups), method, model=model, layout=layout)
    optimizer.finalize()
    assert bool(((model[3].matrix != 0).sum(0) == 2).all())
    assert bool(((model[0].weight != 0).sum(1) == 2).all())


def test_true_on_a_group_selects_embeddings_and_adds_to_where():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    groups = [
        {"params": model[0].parameters(), "sparsify": True},
        {"params": model[1].parameters()},
    ]
    optimizer = SparseOptimizer(
        sgd(groups), METHOD, model=model, where=lambda name, p: name == "1.weight"
    )
    assert list(optimizer.sparse_parameters()) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5}, r"param_groups\[1\] sets 'sparsity' to 0.5, but none of its 2"),
        ({"sparsify": True}, r"param_groups\[1\] sets 'sparsify' to True, but none of its 2"),
    ],
)
def test_a_setting_that_selects_nothing_is_an_error(settings, message):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), **settings}]
    for options in ({"model": model}, {"where": lambda name, p: p.ndim == 2}):
        with pytest.raises(ValueError, match=message):
            SparseOptimizer(sgd(groups), METHOD, **options)


def test_a_group_that_opts_out_may_keep_its_sparsity():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    settings = {"sparsify": False, "sparsity": 0.9}
    groups = [{"params": model[0].parameters(), **settings}, {"params": model[1].parameters()}]
    optimizer = SparseOptimizer(sgd(groups), METHOD, model=model)
    assert list(optimizer.sparse_parameters()) == ["1.weight"]


# What is passed by mistake


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.optim.SGD}, r"base must be an instance, such as SGD\(model.parameters"),
        ({"base": iter([])}, "base must be an optimizer of torch.optim, got <"),
        ({"method": safe_core.safe}, r"got <function safe .*: call it, as in safe_core.safe\(0.9"),
        ({"model": nn.Linear}, "model must be .* got the class Linear: pass an instance"),
        ({"model": [nn.Linear]}, r"got the class Linear: pass an instance for 'model\[0\]'"),
        ({"model": (x for x in ())}, "model must be .*got <class 'generator'>"),
        ({"model": torch.ones(3)}, "model must be .*got <class 'torch.Tensor'>"),
        ({"where": bool}, "where must be a function .*or a list of names, got <class 'bool'>"),
        ({"where": "0.weight"}, "where must be a function of .*a list of names, got '0.weight'"),
        ({"layout": safe_core.Layout}, "layout must be a Layout, a mapping or a function, got <cl"),
        ({"importance": dict}, "importance must be a mapping or a function, .*got <class 'dict'>"),
        (
            {"importance": safe_core.importance.SquaredGradient()},
            "one of safe_core.importance belongs to the method, got SquaredGradient",
        ),
        ({"where": lambda name, p: p != 0}, "where must return True or False, got torch.Tensor of"),
        ({"where": lambda name, p: "yes"}, "where must return True or False, got 'yes' for 0.wei"),
        ({"where": lambda name, p: 1}, "where must return True or False, got 1 for 0.weight"),
    ],
)
def test_another_kind_of_argument_is_named(change, message):
    model = nn.Sequential(nn.Linear(4, 4))
    given = {"base": sgd(model.parameters()), "method": METHOD, "model": model, **change}
    with pytest.raises(TypeError, match=message):
        SparseOptimizer(given.pop("base"), given.pop("method"), **given)


def test_lazy_modules_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"run model\(inputs\) once, .*uninitialised 1\.weight"):
        SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    with pytest.raises(ValueError, match=r"uninitialised a parameter of base"):
        SparseOptimizer(sgd(model.parameters()), METHOD, where=lambda name, p: p.ndim == 2)
    model(torch.ones(1, 4))
    SparseOptimizer(sgd(model.parameters()), METHOD, model=model)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:0", "2-4"])
def test_a_wrong_ratio_is_named(text):
    with pytest.raises(ValueError, match=f'sparsity must be .*"N:M".*got {text!r}'):
        safe_core.safe(text)
    model = nn.Linear(4, 4)
    groups = [{"params": model.parameters(), "sparsity": text}]
    with pytest.raises(ValueError, match=f"^sparsity of a param group must be .*got {text!r}"):
        SparseOptimizer(sgd(groups), METHOD, model=model)


def test_groups_that_do_not_divide_spell_the_pattern_to_write():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    message = (
        r"the input axis of 0\.weight has 3 entries, which 4 does not divide; "
        r"pass sparsity=NM\(n=2, m=4, ragged='dense'\) to leave it dense, or leave the array out, "
        "with where= in an optimizer$"
    )
    with pytest.raises(ValueError, match=message):
        SparseOptimizer(sgd(model.parameters()), safe_core.safe("2:4"), model=model)
    message = r"Block\(shape=\(2, 2\), .*, ragged='dense'\) to leave its tail .* in an optimizer$"
    with pytest.raises(ValueError, match=message):
        SparseOptimizer(
            sgd(model.parameters()),
            safe_core.safe(safe_core.Block((2, 2), 0.5, scope="global")),
            model=model,
        )


def test_a_bad_schedule_of_the_method_is_not_blamed_on_a_group():
    model = nn.Linear(4, 4)
    method = safe_core.safe(0.5, penalty=lambda step: 0.1 - step)
    optimizer = SparseOptimizer(sgd(model.parameters()), method, model=model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match=r"^penalty at step 1 must be a finite number"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (safe_core.NM(2, 4, ragged="dense"), "its 1 input is fewer than 4"),
        (safe_core.Block((16, 1), 0.5, ragged="dense"), "its 8 outputs are fewer than 16"),
        (safe_core.Block((4, 1), 0.5, ragged="dense"), ""),
    ],
)
def test_a_weight_without_a_whole_group_is_dense(pattern, reason):
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 16))
    by_name = safe_core.ByName({"0.weight": pattern}, default=0.5)
    for sparsity in (pattern, by_name):
        optimizer = SparseOptimizer(
            sgd(model.parameters()), safe_core.admm(sparsity, penalty=0.1), model=model
        )
        assert rows(optimizer) == {"0.weight": (reason, True), "1.weight": ("", True)}

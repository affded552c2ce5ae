"""The advice follows from the measured times, and the report holds every form once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import safe_core
from safe_core._readable import readable_bytes, readable_ms
from safe_core.adapters.export_advice import ExportAdvice
from safe_core.adapters.export_choice import choice, own_choice
from safe_core.adapters.export_forms import FORMS, OWN, FormFigures, percent
from safe_core.adapters.export_measurements import Collected, Plan, check_fit, check_plan
from safe_core.adapters.export_sums import SummedTimes, zeroed_bytes
from safe_core.layout import OUTPUT_INPUT

KNOWN = ("dense", "litert", "int8", "1x4", "1x16", "csr", "channels", "2:4")


def forms(**seconds: Mapping[Any, float]) -> tuple[FormFigures, ...]:
    """Figures at batch size 1; a file takes 1000 bytes, less by its zeros."""
    found = []
    for key, times in seconds.items():
        name = key.removeprefix("b")
        sizes = {at: 250 if at == OWN else round(1000 * (1 - at)) for at in times}
        title = FORMS[name].title.format(framework="PyTorch", dtype="float32")
        found.append(FormFigures(name, title, {1: times}, sizes))
    return tuple(found)


def test_a_form_must_beat_all_dense_ones() -> None:
    dense: dict[str, Any] = {"dense": {0.0: 9.0}, "litert": {0.0: 8.0}, "int8": {0.0: 2.0}}
    text = choice(forms(**dense, b1x4={0.8: 4.0, 0.9: 1.9}, b1x16={0.8: 2.5, 0.9: 1.9}), 1)
    assert text.startswith(
        'export dense int8 with save_litert(model, inputs, path, weights="int8")'
    )
    assert "4 times faster than dense float32; no form with zeros is a tenth faster" in text
    # If int8 is no choice, nor are its blocks; the lowest sparsity that pays in floats is.
    assert (
        "if int8 costs too much accuracy, train safe_core.safe(safe_core.Block((1, 4), 0.8)" in text
    )
    # The bar for float32 is the faster runtime: 7.5 is a tenth below 9, but not below 8.
    assert "up to 80% zeros" in choice(forms(**dense, csr={0.8: 7.5}), 1)
    assert "costs too much" not in choice(forms(**dense, csr={0.8: 7.5}), 1)


def test_the_lowest_sparsity_that_pays_is_advised() -> None:
    dense: dict[str, Any] = {"dense": {0.0: 8.0}, "int8": {0.0: 4.0}}
    found = forms(**dense, b1x4={0.8: 2.0, 0.9: 1.0}, b1x16={0.8: 3.7, 0.9: 0.1})
    assert choice(found, 1) == (
        "train safe_core.safe(safe_core.Block((1, 4), 0.8), steps=...), export with "
        'save_litert(model, inputs, path, compute="sparse"): 4 times faster than dense float32, '
        "2 times faster than dense int8, file 5 times smaller than dense float32; 8 times faster "
        "at 90% zeros"
    )


def test_files_are_compared_with_dense_ones_of_their_dtype() -> None:
    """Otherwise a file in int8 would seem small by its zeros."""
    dense: dict[str, Any] = {"dense": {0.0: 8.0}, "litert": {0.0: 8.0}, "int8": {0.0: 4.0}}
    found = {form.name: form for form in forms(**dense, b1x16={0.8: 2.0}, b1x4={0.8: 3.0})}
    found["int8"] = found["int8"]._replace(sizes={0.0: 250})
    found["1x16"] = found["1x16"]._replace(sizes={0.8: 50})
    assert "file 5 times smaller than dense int8" in choice(list(found.values()), 1)
    half = found["dense"]._replace(dtype="bfloat16", sizes={0.0: 500}, seconds={1: {0.0: 7.0}})
    text = choice([half, found["litert"], found["1x4"]], 1)
    assert "2.3 times faster than dense bfloat16 (dense int8 was not measured)" in text
    assert text.endswith("file 5 times smaller than dense float32")


def test_nothing_pays() -> None:
    dense: dict[str, Any] = {"dense": {0.0: 1.0}, "int8": {0.0: 0.95}}
    text = choice(forms(**dense, b1x4={0.8: 0.91}, csr={0.8: 3.0, 0.9: 2.0}), 1)
    assert text == (
        "no form with zeros is a tenth faster than dense int8 up to 90% zeros, so zeros only make "
        "the file smaller; with safe_core.safe(0.8, steps=...), save_compressed makes the file 5 "
        "times smaller"
    )
    # A tenth faster than float32, but not than int8.
    text = choice(forms(**dense, b1x4={0.8: 0.88}, csr={0.8: 3.0}), 1)
    assert text.startswith(
        "no form with zeros is a tenth faster than dense int8 up to 80% zeros; if int8 costs too "
        "much accuracy, train safe_core.safe(safe_core.Block((1, 4), 0.8), steps=...), export with "
    )
    assert "so zeros only" not in text
    # Blocks in int8 lose the accuracy that int8 loses.
    text = choice(forms(**dense, b1x16={0.8: 0.88}, csr={0.8: 3.0}), 1)
    assert text == "no form with zeros is a tenth faster than dense int8 up to 80% zeros"
    alone = choice(forms(dense={0.0: 1.0}, csr={0.8: 3.0}), 1)
    assert "up to 80% zeros (dense int8 was not measured), so zeros only" in alone


def test_nothing_with_zeros_was_timed() -> None:
    dense: dict[str, Any] = {"dense": {0.0: 1.3}, "int8": {0.0: 1.0}}
    assert choice(forms(**dense), 1) == (
        'export dense int8 with save_litert(model, inputs, path, weights="int8"): 1.3 times faster '
        "than dense float32; no form with zeros was measured"
    )
    skipped = FormFigures("1x4", "", {1: {}}, {0.8: 200})
    text = choice([*forms(**dense), skipped], 1)
    assert text.endswith("no form with zeros is faster, because LiteRT computes them dense")


def test_channels_are_the_last_resort() -> None:
    dense: dict[str, Any] = {"dense": {0.0: 8.0}, "int8": {0.0: 4.0}}
    channels = {0.75: 1.0}
    sparse = forms(**dense, channels=channels, csr={0.95: 3.0})
    assert choice(sparse, 1).startswith("train safe_core.safe(0.95,")
    text = choice(forms(**dense, channels=channels, csr={0.95: 3.9}), 1)
    assert text.startswith("export dense int8 with ")
    assert "no form with zeros but removed channels is a tenth faster than that up to 95%" in text
    assert (
        "than other zeros: train safe_core.safe(safe_core.Channel(0.5), steps=...), then call "
        "silence_channels(model, inputs) and shrink(model, inputs), and train the smaller network "
        "further: 8 times faster" in text
    )
    assert "if int8 costs too much accuracy, train safe_core.safe(0.95," in text
    alone = choice(forms(dense={0.0: 8.0}, channels=channels), 1)
    assert alone.startswith("train safe_core.safe(safe_core.Channel(0.5), steps=...)")
    assert alone.endswith("removed channels cost more accuracy than other zeros")


def test_own_zeros_are_judged_apart() -> None:
    dense: dict[str, Any] = {"dense": {0.0: 8.0}, "int8": {0.0: 4.0}}
    assert own_choice(forms(**dense, csr={0.9: 1.0}), 1) == ""
    fast = forms(**dense, csr={OWN: 5.0}, b1x16={OWN: 1.0, 0.9: 9.0})
    assert own_choice(fast, 1, 250) == (
        'with its own zeros, export with save_litert(model, inputs, path, weights="int8", '
        'compute="sparse"): 8 times faster than dense float32, 4 times faster than dense int8'
    )
    assert "train" not in choice(fast, 1)  # own zeros need no training
    assert own_choice(forms(**dense, csr={OWN: 5.0}), 1, 250) == (
        "with its own zeros the model is 1.6 times faster than dense float32 (CSR, PyTorch), but "
        "not a tenth faster than dense int8; save_compressed makes the file 4 times smaller"
    )
    # Zeros that were not timed make a file smaller, too, unless they are too few.
    assert own_choice(forms(**dense), 1, 800) == (
        "its own zeros were not timed; save_compressed makes the file 1.2 times smaller"
    )
    assert own_choice(forms(**dense), 1, 1000) == ""


@pytest.mark.parametrize(
    ("name", "sparsity", "ragged", "pattern"),
    [
        ("1x4", 0.9996, False, "safe_core.Block((1, 4), 0.9996)"),
        ("csr", 0.96875, False, "0.96875"),
        ("channels", 0.8, False, "safe_core.Channel(0.553)"),
        ("channels", 0.9999999, False, "safe_core.Channel(0.9997)"),
        ("1x4", 0.9, True, 'safe_core.Block((1, 4), 0.9, ragged="dense")'),
        ("2:4", 0.5, False, '"2:4"'),
        ("2:4", 0.5, True, 'safe_core.NM(2, 4, ragged="dense")'),
    ],
)
def test_patterns_have_the_sparsity_that_was_measured(
    name: str, sparsity: float, ragged: bool, pattern: str
) -> None:
    assert FormFigures(name, "", ragged=ragged).pattern(sparsity) == pattern
    safe_core.safe(eval(pattern), steps=10)


def test_large_numbers_have_no_exponent() -> None:
    found = forms(dense={0.0: 123.4}, csr={0.9: 1.0})
    assert ": 120 times faster than dense float32" in choice(found, 1)
    assert (readable_ms(1.5), readable_ms(0.0123)) == ("1500 ms", "12.3 ms")
    assert readable_bytes(2**20 - 1) == "1.0 MiB"
    assert readable_bytes(2**30 - 1) == "1.0 GiB"
    assert (readable_bytes(1023), readable_bytes(1024)) == ("1023 B", "1.0 KiB")
    assert (percent(0.96875), percent(0.9996)) == ("96.875%", "99.96%")


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "forms": None,
        "batch_sizes": [1],
        "sparsities": [0.9, 0.8],
        "repeats": 3,
        "zeros": 0.0,
    }
    return check_plan("PyTorch", KNOWN, **given | changes)


def report() -> ExportAdvice:
    found = Collected(plan(forms=["1x4", "1x16", "csr", "2:4"]))
    for form, times in {
        "dense": {0.0: 8e-3},
        "int8": {0.0: 2e-3},
        "1x4": {0.8: 4e-3, 0.9: 1e-3},
        "csr": {0.8: 9e-3, 0.9: 9e-3},
    }.items():
        for at, seconds in times.items():
            found.add(form, 1, at, seconds, round(2048 * (1 - at)))
    found.add("1x16", 1, 0.8, None, 100)
    found.not_measured(["litert", "2:4"], "it is not here")
    return found.advice("a machine")


def test_the_report_holds_every_form_once() -> None:
    found = report()
    assert [form.name for form in found.forms] == list(KNOWN)
    assert found.form("channels").reason == "forms= leaves it out"
    assert found.form("1x16").seconds == {1: {}}  # a size without a time
    assert (found.pays_from("1x4", 1), found.beats_int8_from("1x4", 1)) == (0.8, 0.9)
    assert (found.pays_from("csr", 1), found.pays_from("2:4", 1)) == (None, None)
    assert str(found).splitlines()[:14] == [
        "milliseconds of a call, batch size 1:",
        "  form                        dense  80%  90%  pays from  over int8 from",
        "  dense float32, PyTorch          8",
        "  dense int8, LiteRT              2                dense",
        "  blocks 1x4 float32, LiteRT           4    1        80%             90%",
        "  blocks 1x16 int8, LiteRT                            no              no",
        "  CSR, PyTorch                         9    9         no              no",
        "",
        "size of the file:",
        "  form                          dense    80%    90%",
        "  dense float32, PyTorch      2.0 KiB",
        "  dense int8, LiteRT          2.0 KiB",
        "  blocks 1x4 float32, LiteRT           410 B  205 B",
        "  blocks 1x16 int8, LiteRT             100 B",
    ]
    lines = str(found).splitlines()
    assert "  dense float32, LiteRT; 2:4, CUDA: it is not here" in lines
    assert "medians on a machine" in lines
    last = lines.index("batch size 1:", lines.index("medians on a machine"))
    assert " ".join(map(str.strip, lines[last + 1 :])) == found.advice[1]
    call = 'save_litert(model, inputs, path, compute="sparse")'
    assert sum(call in line for line in lines[last:]) == 1  # to be copied, so never broken
    assert max(map(len, lines)) <= 100
    plain = found.plain()
    assert list(plain["forms"]) == list(KNOWN)
    assert plain["forms"]["1x4"]["seconds"] == {"batch size 1": {"0.8": 4e-3, "0.9": 1e-3}}
    assert "pays_from" not in plain["forms"]["int8"]
    with pytest.raises(KeyError, match="name must be one of dense, litert"):
        found.form("CSR")


def test_the_only_batch_size_may_be_left_out() -> None:
    found = report()
    assert (found.pays_from("1x4"), found.beats_int8_from("1x4")) == (0.8, 0.9)
    assert (found.pays_from("int8"), found.beats_int8_from("int8")) == (None, None)
    with pytest.raises(ValueError, match="batch must be one of 1, got 8"):
        found.pays_from("1x4", 8)
    several = replace(found, batch_sizes=(1, 8))
    with pytest.raises(ValueError, match="batch must be one of 1, 8, got None"):
        several.beats_int8_from("1x4")


def test_a_form_with_figures_is_not_listed_as_missing() -> None:
    found = Collected(plan(batch_sizes=[1, 8], forms=["1x4"]))
    for batch in (1, 8):
        found.add("dense", batch, 0.0, 8e-3, 1000)
    found.add("1x4", 1, 0.9, 1e-3, 100)
    found.not_measured(["1x4"], "it failed", "batch size 8")
    advice = found.advice("a machine")
    assert advice.form("1x4").reason == ""
    title = "blocks 1x4 float32, LiteRT"
    assert f"{title} was not measured for batch size 8: it failed" in advice.notes
    assert advice.plain()["forms"]["1x4"]["bytes"] == {"0.9": 100}


def test_different_reasons_name_their_places() -> None:
    found = Collected(plan(forms=["csr", "1x4"]))
    found.add("dense", 1, 0.0, 8e-3, 1000)
    found.not_measured(["csr"], "no kernel", "80% zeros")
    found.not_measured(["csr"], "too large", "90% zeros")
    found.not_measured(["1x4"], "it failed", "80% zeros")
    advice = found.advice("a machine")
    assert advice.form("csr").reason == "for 80% zeros: no kernel; for 90% zeros: too large"
    assert advice.form("1x4").reason == "it failed"


def test_patterns_that_do_not_fit_a_weight_leave_its_tail_dense() -> None:
    weights = [("a", (16, 32), OUTPUT_INPUT), ("b", (10, 20), OUTPUT_INPUT)]
    found = Collected(plan(forms=["1x4", "1x16", "csr"]))
    check_fit(found, weights)
    assert found.ragged == {"1x16"}
    check_fit(found, [("c", (2, 3, 4), None)])
    assert "blocks 1x4 float32, LiteRT: leave out c with where=" in "\n".join(found.notes)


def test_arrays_may_list_numbers() -> None:
    found = plan(sparsities=np.asarray([0.9, 0.8], "f4"), batch_sizes=np.asarray([1, 8]))
    assert (found.sparsities, found.batch_sizes) == ((0.8, 0.9), (1, 8))


def test_sizes_count_only_weights_with_zeros() -> None:
    assert zeroed_bytes(4000, [], 0.9) == 4000
    assert zeroed_bytes(4000, [(800, 4)], 0.9) == 800 + 80 * 4 + 100


def test_sums_of_layers_take_a_sparse_form_where_it_is_faster() -> None:
    totals = SummedTimes(10.0)
    totals.add(2, {("dense", 0.0): 3.0, ("csr", 0.9): 1.0})
    totals.add(1, {("dense", 0.0): 2.0, ("csr", 0.9): 1.9})  # no tenth faster
    assert dict(totals.seconds()) == {("csr", 0.9): 6.0}
    # Layers that take longer alone than in the model save no more than the model takes.
    totals = SummedTimes(1.0)
    totals.add(1, {("dense", 0.0): 2.0, ("csr", 0.9): 0.5})
    assert dict(totals.seconds()) == {("csr", 0.9): pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ({"batch_sizes": [0]}, ValueError, "batch_sizes must be at least 1, got 0"),
        ({"batch_sizes": 3}, TypeError, "batch_sizes must be a list of numbers, got 3"),
        ({"batch_sizes": np.asarray(3)}, TypeError, "batch_sizes must be a list of numbers, got"),
        ({"batch_sizes": []}, ValueError, "batch_sizes must have an entry, got none"),
        ({"sparsities": [0.0]}, ValueError, "sparsities must be above 0, because the dense"),
        ({"sparsities": [1.0]}, ValueError, "sparsities must be a fraction in [0, 1)"),
        ({"sparsities": "0.9"}, TypeError, "sparsities must be a list of numbers, got '0.9'"),
        ({"forms": "1x4"}, TypeError, "forms must be a list of names, got '1x4'"),
        (
            {"forms": ["int8"]},
            ValueError,
            "forms must be among 1x4, 1x16, csr, channels, 2:4, got 'int8'",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        plan(**changes)
    assert plan(batch_sizes=None, zeros=0.005).own is None
    assert (plan(zeros=0.02).own, plan().sparsities) == (0.02, (0.8, 0.9))

"""The benchmarks: that the peers do what they stand for, and that every case runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import safe_core
from safe_core import ADMM, project
from safe_core.adapters.torch.blocks import SafeReconstruction, plan_pruning, prune_blocks
from safe_core.solvers import named_solvers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    __main__ as command_line,
)
from benchmarks import (  # noqa: E402
    blocks,
    byte_llama,
    corpus,
    devices,
    elsa,
    litert,
    llama_block,
    memory,
    peers,
    projection,
    pruning_tables,
    savings,
    smaller_networks,
    smollm2,
    steps,
)
from benchmarks.iterative import IterativeSAM  # noqa: E402
from benchmarks.report import machine, plot, tables  # noqa: E402
from benchmarks.timing import Result, interleaved  # noqa: E402


@pytest.mark.parametrize("peer", [peers.by_sort, peers.by_kthvalue, peers.by_topk])
def test_thresholds_of_peers_keep_what_the_projection_keeps(peer) -> None:
    arrays = [torch.randn(40, 5), torch.randn(100)]
    for got, want in zip(peer(arrays, 60), project(arrays, 0.8).values, strict=True):
        assert torch.equal(got, want)
    in_jax = [jnp.asarray(x.numpy()) for x in arrays]
    for got, want in zip(peers.by_sort_jax(in_jax, 60), project(in_jax, 0.8).values, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sam", [peers.MinimalSAM, peers.ForeachSAM])
def test_minimal_sam_goes_up_and_back(sam: type[peers.MinimalSAM]) -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = sam([p], torch.optim.SGD, rho=0.5, lr=1.0)
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), torch.tensor([3.3, 4.4]))
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor([2.0, 4.0]))


def test_two_array_admm_takes_the_steps_of_the_method() -> None:
    p = torch.nn.Parameter(torch.tensor([[1.0, 3.0]]))
    base = torch.optim.SGD([p], lr=0.5)
    peer = peers.TwoArrayADMM([p], base, sparsity=0.5, penalty=1.0, interval=1)
    p.grad = torch.zeros(1, 2)
    peer.step()  # x - z + u = (1, 0); x = (0.5, 3), z = (0, 3), u = (0.5, 0)
    assert torch.equal(p.detach(), torch.tensor([[0.5, 3.0]]))
    assert torch.equal(peer.z[0], torch.tensor([[0.0, 3.0]]))
    assert torch.equal(peer.u[0], torch.tensor([[0.5, 0.0]]))


def test_the_shapes_are_those_of_resnet50() -> None:
    shapes = steps.resnet50_shapes()
    assert (len(shapes), sum(math.prod(s) for s in shapes)) == (161, 25_557_032)


def test_ratios_are_against_the_first_in_the_same_repeat() -> None:
    calls: list[str] = []
    results = interleaved(
        "c", {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, calls=2
    )
    assert calls == list("abaabbaabb")
    assert [r.name for r in results] == ["a", "b"]
    assert results[0].ratio == 1


def test_tables_name_the_machine_and_the_plot_is_drawn(tmp_path: Path) -> None:
    results = [Result(f"size {n}", "ours", n / 10, "ms", 1.5, 2.0) for n in (10, 100)]
    text = tables(results, {"CPU": "a processor"})
    assert "| CPU | a processor |" in text
    assert "| ours | 10 | 1.50 | 2 |" in text
    plot(results, tmp_path / "plot.png", {"CPU": "a processor"})
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks of steps take one step of two parameters."""
    for module in (steps, memory):
        monkeypatch.setattr(module, "resnet50_shapes", lambda width: [(8, 4, 3, 3), (8,)])
    monkeypatch.setattr(steps, "INTERVAL", 1)


def test_on_a_gpu_a_projection_competes_with_sorts_of_its_framework() -> None:
    found = projection.against_sorts(sizes=[1000, 2000], repeats=1)
    names: dict[str, list[str]] = {}
    for result in found:
        names.setdefault(result.case, []).append(result.name)
    flat = [f"torch.{name} of the flat array" for name in ("sort", "topk", "kthvalue")]
    for size in (1000, 2000):
        ours = ["safe_core, PyTorch", "safe_core, PyTorch bfloat16"]
        assert names[f"size {size}, PyTorch"] == flat + ours
        assert names[f"size {size}, JAX"] == [
            "jnp.sort of the flat array",
            "jax.lax.top_k of the flat array",
            "safe_core, JAX jit, counting",
        ]
    budgets = {r.name: r.budget for r in found if r.budget}
    assert budgets == {"safe_core, PyTorch": 1, "safe_core, JAX jit, counting": 1}
    assert [10**n for n in range(5, 10)] == command_line.GPU_SIZES


def test_sizes_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "free_bytes", lambda framework: 60_000)
    for timed in (projection.against_sorts, projection.one_pass):
        found = timed(sizes=[1000, 2000], repeats=1)
        assert found
        assert not [r for r in found if "2000" in r.case or "2,000" in r.case]
    assert projection.reading(size=2000, repeats=1) == []
    assert len(projection.reading(size=1000, repeats=1)) == 2


def test_a_projection_is_compared_with_one_pass_in_each_framework() -> None:
    found = projection.one_pass(sizes=[1000], repeats=1)
    once = projection.ONCE
    names = [once, "safe_core, PyTorch", once, "safe_core, JAX jit"]
    assert [r.name for r in found] == names
    assert [r.budget for r in found] == [None] * 4
    large = projection._once(10**7, "X", lambda: None, lambda: None, 1)
    assert [r.budget for r in large] == [None, 4]


@pytest.mark.usefixtures("few_parameters")
@pytest.mark.parametrize(("gpu", "baseline", "budget"), [
    (False, "minimal SAM", 1.15), (True, "foreach SAM", 1.0)
])  # fmt: skip
def test_a_step_competes_with_the_sam_of_its_device(
    gpu: bool, baseline: str, budget: float
) -> None:
    found = steps.torch_step(width=1, repeats=1, compiled=False, gpu=gpu)
    assert next(r.name for r in found[:6]) == f"{baseline} + SGD"
    assert {r.name: r.budget for r in found if r.budget} == {
        "safe_core + SGD": budget, "safe_core + Adam": budget
    }  # fmt: skip
    assert len(found) == 12
    in_jax = steps.jax_step(width=1, repeats=1, gpu=gpu)
    assert [r.name for r in in_jax][:2] == ["optax.contrib.sam + sgd", "safe_core + sgd"]
    assert in_jax[1].budget == (1.1 if gpu else None)


def test_the_bytes_of_a_step_are_those_of_its_passes() -> None:
    # One sparse array of 32 entries, and a dense one of 4. Ten passes over all of 36 and one over
    # the anchor; and in one of 32 steps x, the anchor twice, and a byte of support twice.
    assert steps.step_bytes([(8, 4), (4,)], "SGD") == 4 * (10 * 36 + 32) + 14
    assert steps.step_bytes([(8, 4), (4,)], "Adam") == 4 * (12 * 36 + 32) + 14


@pytest.mark.usefixtures("few_parameters")
def test_a_step_is_compared_with_a_copy_of_its_bytes() -> None:
    copy, ours, bandwidth, *_ = steps.bytes_step(width=1, repeats=1, compiled=False)
    moved = steps.step_bytes([(8, 4, 3, 3), (8,)], "SGD")
    assert copy.name.startswith(f"a copy that reads and writes {moved / 1e6:.4g} MB in all")
    assert (ours.name, ours.budget) == ("safe_core + SGD", None)
    assert bandwidth.unit == "GB/s"
    assert bandwidth.value == pytest.approx(moved / 1e9 / (copy.value / 1e3))


def test_the_part_of_the_host_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "torch_device", lambda: "meta")  # a device that is not the CPU
    seen = []

    def parameters(shapes: Any, device: str) -> Any:
        seen.append(device)
        return [torch.nn.Parameter(torch.ones(2, 2))], [torch.ones(2, 2)]

    monkeypatch.setattr(steps, "_parameters", parameters)
    monkeypatch.setattr(steps, "INTERVAL", 1)
    steps.host_step(repeats=1)
    assert set(seen) == {"cpu"}


@pytest.mark.usefixtures("few_parameters")
def test_the_peak_of_a_step_is_measured_with_and_without_a_dual_update() -> None:
    without, dual = memory.step_peaks(width=1)
    assert (without.name, dual.name) == (
        "a step without a dual update", "a step with a dual update"
    )  # fmt: skip
    assert 4 < without.value < dual.value  # the copy of x, and temporary arrays
    assert dual.ratio == dual.value / without.value


@pytest.fixture
def kind_of_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(devices, "_hidden", False)
    before = jax.config.jax_default_device
    yield monkeypatch
    jax.config.update("jax_default_device", before)


def test_a_gpu_is_measured_only_if_both_frameworks_see_it(kind_of_device: Any) -> None:
    kind_of_device.setattr(devices, "without_gpu", lambda: ["JAX"])
    with pytest.raises(ValueError, match=r"got no GPU in \['JAX'\]"):
        devices.choose("gpu")
    devices.choose(None)
    assert (devices.on_gpu(), devices.torch_device()) == (False, "cpu")
    kind_of_device.setattr(devices, "without_gpu", list)
    for kind, gpu in (("cpu", False), ("gpu", True), (None, True)):
        devices.choose(kind)  # type: ignore[arg-type]
        assert (devices.on_gpu(), devices.torch_device()) == (gpu, "cuda" if gpu else "cpu")
        assert (jax.config.jax_default_device is None) == gpu


def test_the_machine_is_described_with_its_devices(kind_of_device: Any) -> None:
    found = machine()
    assert found["device of JAX"] == devices.jax_device()
    card = Namespace(platform="gpu", device_kind="NVIDIA X")
    kind_of_device.setattr(devices.jax, "devices", lambda *kind: [card])
    jax.config.update("jax_default_device", None)
    kind_of_device.setattr(torch.cuda, "is_available", lambda: True)
    properties = Namespace(name="NVIDIA X", total_memory=80 * 2**30)
    kind_of_device.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    kind_of_device.setattr(torch.version, "cuda", "13.0")
    assert devices.gpu_name() == "NVIDIA X, 80 GiB, CUDA 13.0"
    assert devices.jax_device() == "NVIDIA X (gpu)"


def test_each_kind_of_device_has_its_table_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "_static").mkdir()
    for gpu in (False, True):
        results = [Result("size 10, X", "gpu" if gpu else "cpu", 1.0, "ms", 1.0)]
        described = {"CPU": "a processor", "GPU": "a card" if gpu else "none"}
        command_line.write_docs(results, described, tmp_path, gpu=gpu)
    files = {kind: f"benchmarks{kind}_table.md" for kind in ("", "_gpu")}
    page = (ROOT / "docs/performance.md").read_text()
    for (kind, file), name in zip(files.items(), ("cpu", "gpu"), strict=True):
        text = (tmp_path / file).read_text()
        assert f"| {name} | 1 |" in text
        assert f"(_static/scaling{kind}.png)" in text
        assert (tmp_path / f"_static/scaling{kind}.png").exists()
        assert f"```{{include}} {file}\n" in page
        assert f"nox --no-venv -s benchmarks -- --device {name} --compile --docs\n" in page
    command_line.write_docs([Result("c", "x", 1.0, "ms", 1.0)], described, tmp_path, gpu=True)
    assert "scaling" not in (tmp_path / files["_gpu"]).read_text()


def test_cases_are_those_of_the_device() -> None:
    on_cpu = command_line.cases(True, 1, False, False)
    on_gpu = command_line.cases(True, 1, False, True)
    assert {"loading", "selection"} == on_cpu.keys() - on_gpu.keys()
    assert {"reading", "bytes"} == on_gpu.keys() - on_cpu.keys()


def test_every_method_prunes_a_llama_block_in_the_memory_that_is_predicted() -> None:
    found = llama_block.pruning(llama_block.TINY, compiled=False)
    names = set(named_solvers())
    times, peaks = found[: len(names)], found[len(names) :]
    assert {r.name for r in times} == names
    assert {r.name.split(";")[0] for r in peaks} == names
    assert next(r.name for r in times) == "magnitude"
    for result in peaks:
        predicted = float(re.search(r"predicted ([\d.]+) MB", result.name)[1])  # type: ignore[index]
        larger = max(result.value / predicted, predicted / result.value)
        assert result.ratio == pytest.approx(larger, rel=1e-2)
        assert result.ratio < 1.5  # the sizes are so small that small arrays count
        assert result.budget == 1.2
    compiled = {name for name, _ in llama_block.methods(llama_block.TINY, compiled=True)}
    assert compiled - names == {f"{name}, compiled" for name in names if "safe" in name}


def test_the_block_has_the_shapes_of_llama_2_7b(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = llama_block.LLAMA_2_7B
    with torch.device("meta"):
        block = llama_block.model(sizes).model.layers[0]
    shapes = {tuple(p.shape) for p in block.parameters()}
    assert shapes == {(4096, 4096), (11008, 4096), (4096, 11008), (4096,)}
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in block.parameters()) == 202_383_360
    assert block.self_attn.config.num_attention_heads == 32
    assert (sizes.samples, sizes.length) == (128, 2048)


def test_the_memory_estimate_on_the_page_is_that_of_a_plan(tmp_path: Path) -> None:
    rows = llama_block.training_bytes(llama_block.LLAMA_2_7B)
    page = (ROOT / "docs/transformers.md").read_text()
    table = page.split("## Memory and time for a large model", 1)[1].split("**sum**", 1)[0]
    shown = re.findall(r"^\| .* \| ([\d.]+) \|$", table, re.MULTILINE)
    assert shown == [f"{value / 1e9:.2f}" for value in rows.values()]
    assert f"| **sum** | | **{sum(rows.values()) / 1e9:.1f}** |" in page
    # The same sum for a smaller block of the same proportions, against a plan. On a GPU, autocast
    # is the default and the activations of all samples are not on the device.
    small = llama_block.Sizes(512, 1376, 4, 16, 256)
    plan = plan_pruning(
        llama_block.model(small),
        torch.zeros(small.samples, small.length, dtype=torch.long),
        SafeReconstruction(importance="wanda", autocast=True),
        0.5,
        offload="disk",
        work_dir=tmp_path / "work",
    )
    assert plan.memory.device == pytest.approx(
        sum(llama_block.training_bytes(small).values()), rel=0.03
    )


def test_tables_of_pruning_average_over_seeds_and_mark_the_best() -> None:
    sizes = {"study": "llama", "sparsity": "0.5", "samples": 8, "length": 4, "epochs": 2}
    found = [
        {**sizes, "method": m, "perplexity": p, "drift": [0.0, p], "block_errors": [p, 1.0]}
        for m, p in (("ours", 2.0), ("ours", 4.0), ("theirs", 3.5))
    ]
    dense = {**sizes, "method": "Dense", "sparsity": "0", "perplexity": 1.25}
    text = pruning_tables.tables([dense, *found], ["ours", "theirs"], {"CPU": "a processor"})
    assert "8 samples of 4 tokens; methods that train use 2 epochs; the perplexity" in text
    assert "of the dense model is 1.25." in text
    assert "| perplexity | 0.5 |\n| --- | ---: |\n| ours | **3 ± 1** |\n| theirs | 3.5 |" in text
    assert "| ours | **3 ± 1** | **1 ± 0** | **4 ± 1** |" in text  # blocks and their sum
    with pytest.raises(ValueError, match="one setting for llama"):
        pruning_tables.tables([dense | {"epochs": 3}, *found], ["ours"], {})


def test_a_table_of_blocks_relates_errors_to_those_of_alps() -> None:
    def run(method: str, *errors: float, samples: int = 8) -> dict[str, Any]:
        cell = {"model": "a", "sparsity": "2:4", "method": method, "samples": samples}
        return cell | {"calibration": list(errors), "held out": [2 * e for e in errors]}

    text = blocks.markdown([run("ALPS", 0.1, 0.4), run("SAFE+", 0.05, 0.05)])
    assert "| a | 2:4 | 0.2 / 0.4 | 0.25 / 0.25 |" in text
    assert "| **geometric mean** | | | 0.25 / 0.25 |" in text
    more = [run("ALPS", 0.2, samples=16), run("SAFE+", 0.1, samples=16)]
    first, second = blocks.markdown([*more, run("ALPS", 0.1), run("SAFE+", 0.3)]).split("\n\n")
    assert first.startswith("| model, 16 samples |")
    assert "| a | 2:4 | 0.2 / 0.4 | 0.50 / 0.50 |" in first
    assert second.startswith("| model, 8 samples |")
    assert "| **geometric mean** | | | 3.00 / 3.00 |" in second


def test_a_table_of_perplexities_marks_the_best_and_leaves_gaps() -> None:
    def run(method: str, sparsity: str, perplexity: float) -> dict[str, Any]:
        line = {"method": method, "sparsity": sparsity, "perplexity": perplexity}
        line |= dict.fromkeys(smollm2.SETTINGS, 4)
        return line | {"standard_error": 0.5, "seconds_per_block": 2.0, "predicted_bytes": 3e6}

    lines = [run("Dense", "0", 9.0), run("ALPS", "0.5", 12.0), run("SAFE+", "0.5", 11.0)]
    text = smollm2.markdown([*lines, run("ALPS", "2:4", 14.0)])
    assert text.startswith("| perplexity (dense 9.00 ± 0.50) | 0.5 | 2:4 | s per block | MB |")
    assert "| ALPS | 12.00 ± 0.50 | **14.00 ± 0.50** | 2.0 | 3 |" in text
    assert "| SAFE+ | **11.00 ± 0.50** |  | 2.0 | 3 |" in text
    with pytest.raises(ValueError, match="results must have one setting"):
        smollm2.markdown([*lines, run("ALPS", "2:4", 14.0) | {"epochs": 3}])
    tuned = run("SAFE+", "0.5", 10.0) | {"tuned": smollm2.TUNING[1]}
    text = smollm2.markdown([*lines, tuned])
    assert "| SAFE+ | **11.00 ± 0.50** | 2.0 | 3 |" in text
    assert "| SAFE+, 0.5 | 11.00 ± 0.50 |  | 10.00 ± 0.50 |" in text


def small_llama(tokens: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", smollm2.TUNING)
def test_fine_tuning_keeps_the_zeros_and_lowers_the_perplexity(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {held: torch.arange(400) % 8 for held in (False, True)}

    def load(folder: Path) -> Any:
        model = small_llama(16)
        with torch.no_grad():  # a dense model may have zeros, which training need not keep
            model.model.layers[0].mlp.up_proj.weight[0, 0] = 0
        return model

    monkeypatch.setattr(smollm2, "load", load)
    monkeypatch.setattr(smollm2, "tokens", lambda folder, held: texts[held])
    options = Namespace(samples=8, length=16, epochs=1, tokens=160, seed=0, rank=4, steps=60)
    options.batch, options.device, options.model, options.pruned = 4, "cpu", tmp_path, tmp_path
    options.results, options.methods, options.sparsities = tmp_path / "r", ["Magnitude"], ["2:4"]
    options.tune = False
    dense, pruned = smollm2.runs(options)
    assert (dense["method"], pruned["method"], pruned["achieved"]) == ("Dense", "Magnitude", 0.5)
    options.tune = True
    monkeypatch.setattr(smollm2, "TUNING", (kind,))
    dense_tuned, tuned = smollm2.runs(options)  # raises if zeros are lost
    assert tuned["perplexity"] < 0.99 * pruned["perplexity"]
    assert dense_tuned["method"] == "Dense"
    assert dense_tuned["perplexity"] < 0.99 * dense["perplexity"]
    assert "| Dense | " in smollm2.markdown([dense, pruned, dense_tuned, tuned])
    options.results.write_text(f"{json.dumps(dense_tuned)}\n{json.dumps(tuned)}\n")
    assert list(smollm2.runs(options)) == []


def test_ids_of_the_byte_tokenizer_are_bytes(tmp_path: Path) -> None:
    """They are also after it is saved, and for text of any kind."""
    byte_llama.byte_tokenizer().save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(300))) + " def f( x ):\r\n\t#  don't ,  日本語 🙂\n\n"
    ids = saved(text)["input_ids"]
    assert ids == list(text.encode())
    assert saved.decode(ids) == text


@pytest.mark.every_second
@pytest.mark.parametrize("method", ["Wanda, fine-tuned", "GMP", "ELSA-L", "ADMM, untuned"])
def test_every_kind_of_run_against_elsa_ends_sparse(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_llama(256).save_pretrained(tmp_path)
    network = replace(elsa.byte_llama(tmp_path), steps=30, updates=10, predictions=2048)
    network = replace(network, rates=(1e-3, 3e-3), penalties=(10.0,))
    assert network.interval == 3
    options = Namespace(seed=0, sparsities=[0.5], methods=[method], results=tmp_path / "r.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", safe_core.FinalizeWarning)
        dense, *found = elsa.runs([network], options)  # raises if zeros are lost
    assert [line["rate"] for line in found] == [1e-3, 3e-3]
    assert found[1]["found"]["test"] < 0.9 * dense["found"]["test"]
    # The table shows the run that is better on the other half of the text.
    found[0]["found"] = {"choice": 1.0, "test": 50.0}
    assert f"| {method} | **50.00** |" in elsa.markdown([dense, *found])
    options.results.write_text("".join(json.dumps(line) + "\n" for line in [dense, *found]))
    assert list(elsa.runs([network], options)) == []


def test_the_dense_network_is_trained_as_long_as_the_sparse_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_llama(256).save_pretrained(tmp_path)
    network = replace(elsa.byte_llama(tmp_path), steps=30, predictions=2048, rates=(1e-3, 3e-3))
    options = Namespace(
        seed=0, sparsities=[0.5, 0.7], methods=[elsa.DENSE], results=tmp_path / "r.jsonl"
    )
    dense, *found = elsa.runs([network], options)
    assert [(line["sparsity"], line["rate"]) for line in found] == [(None, 1e-3), (None, 3e-3)]
    assert found[1]["found"]["test"] < 0.9 * dense["found"]["test"]
    dense["found"]["test"] = 60.0
    found[0]["found"] = {"choice": 1.0, "test": 50.0}
    assert "(dense 60.00, fine-tuned 50.00)" in elsa.markdown([dense, *found])


@pytest.mark.long  # reads the documentation of every module of Python
def test_documentation_comes_from_different_files() -> None:
    seen, held_out = corpus.documentation(False), corpus.documentation(True)
    assert len(seen) > 5 * len(held_out) > 100_000
    longest = max(held_out.split("\n\n"), key=len)
    assert longest not in seen


@pytest.mark.parametrize("method", ["ALPS", pytest.param("SAFE+", marks=pytest.mark.long)])
def test_errors_of_blocks_are_measured_on_both_sets_of_inputs(method: str) -> None:
    torch.manual_seed(0)
    small = blocks.first_blocks(blocks.random_gpt2(8), 2)
    small = small._replace(held_out=small.calibration)
    dense = [p.clone() for p in small.model.parameters()]
    solver = blocks.METHODS[method]()
    found = blocks.errors(small, solver, "2:4")
    assert found["held out"] == pytest.approx(found["calibration"], rel=1e-3)
    assert all(map(torch.equal, small.model.parameters(), dense))


@pytest.mark.parametrize("study", ["growth", "first block"])
def test_a_run_of_pruning_that_has_results_is_left_out(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import transformers as pruning

    def ran(cell: Any, *given: Any) -> dict[str, Any]:
        return {**asdict(cell), "hidden": given[0]}

    def ran_block(of: Any, cell: Any, rate: float, penalty: float, device: str) -> dict[str, Any]:
        return {**asdict(cell), "penalty": penalty}

    monkeypatch.setattr(pruning, "growth", ran)
    monkeypatch.setattr(pruning, "first_block", ran_block)
    options = Namespace(study="llama", samples=8, length=4, epochs=2, device="cpu", model=tmp_path)
    options.hidden, options.methods = [64, 128], ["ALPS", "SAFE"]
    options.results = tmp_path / "results.jsonl"
    runs = pruning._growth_runs if study == "growth" else pruning._first_block_runs
    found = list(runs(options))
    assert len(found) == {"growth": 2 * 2, "first block": 2 * 3}[study]
    options.results.write_text("".join(json.dumps(line) + "\n" for line in found[1:]))
    assert list(runs(options)) == found[:1]


def test_smaller_networks_are_timed_beside_the_networks_that_they_were() -> None:
    name = "LeNet-300-100, digits"
    rows = list(smaller_networks.measure(name, 2, 0.8, repeats=2, calls=1))
    assert [(row.framework, row.parameters) for row in rows] == [("PyTorch", 5330), ("JAX", 5330)]
    assert all(row.dense > 0 and row.speedup > 0 for row in rows)
    row = smaller_networks.Row("A", "JAX", 8, 0.5, 3, 1.25, 2.0)
    table = smaller_networks.markdown([row, row._replace(removed=0.8, dense=1.5, speedup=4.0)])
    assert table.splitlines()[2] == "| A | JAX | 8 | 1.25 | 2.00 | 4.00 |"


def test_the_savings_are_those_of_the_published_method(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}

    def train(recipe: Any, run: Any, given: Any, layers: Any, device: str) -> Any:
        found[run.noise, run.sparsity] = recipe.method(run, 1000)
        return layers, layers

    monkeypatch.setattr(savings.train_jax, "train", train)
    recipes = {"SAFE": savings.variants(epochs=1)["SAFE"]}
    ((name, accuracies),) = savings.savings(recipes, [(0.5, 0.95)], seeds=2)
    assert (name, [len(a) for a in accuracies]) == ("SAFE", [2])
    (method,) = found.values()
    assert isinstance(method.constraint, ADMM)
    assert method.constraint.penalty(1000) == savings.PENALTY
    assert method.perturbation.rho(0) == 0.1
    assert method.sparsity.sparsity_of("x") == 0.95


@pytest.mark.long
def test_the_command_runs_and_writes_its_results(tmp_path: Path) -> None:
    named = ["--case", "selection", "--case", "memory", "--case", "pass", "--case", "torch"]
    named += ["--case", "block", "--case", "report", "--case", "loading"]
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--device",
        "cpu",
        *named,
        "--json",
        tmp_path / "r.json",
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert "| CPU |" in finished.stdout
    assert found["machine"]["device of JAX"] == "CPU"
    assert len(found["results"]) > 15
    for result in found["results"]:
        assert 0 < result["ratio"] < math.inf, result
        assert result["name"] in finished.stdout
    state = {r["name"]: r["value"] for r in found["results"] if r["name"].startswith("state")}
    assert state == {
        "state, two-array ADMM in PyTorch": 8,
        "state, safe_core in PyTorch": 5,
        "state, safe_core in JAX": 5,
        "state in bfloat16, safe_core in PyTorch": 3,
        "state in bfloat16, safe_core in JAX": 3,
    }


def test_imp_sam_prunes_a_block() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    solver = IterativeSAM(epochs=10, published=True)
    report = prune_blocks(model, torch.randn(16, 8), solver, 0.5, blocks=model)
    assert report.sparsity == 0.5
    assert int((model[0].weight == 0).sum()) == 32


def _file(speed: float, accuracy: float) -> dict[str, Any]:
    seconds = {"this file": 1.0, "dense int8": 2.0, "dense float32": speed}
    return {"size": 250_000, "seconds": seconds, "accuracy": accuracy}


def test_the_table_of_files_has_medians_of_speeds_and_means_of_accuracies(tmp_path: Path) -> None:
    runs = [
        {
            "task": "digits",
            "pattern": "1x16",
            "sparsity": 0.9,
            "seed": seed,
            "files": {"int8": file},
        }
        for seed, file in enumerate([_file(2.0, 90.0), _file(3.0, 92.0), _file(9.0, 94.0)])
    ]
    alone = {"size": 4_000_000, "seconds": {"this file": 1.0}, "accuracy": 95.0}
    runs.append(
        {
            "task": "digits",
            "pattern": "dense",
            "sparsity": 0.0,
            "seed": 0,
            "files": {"float32": alone},
        }
    )
    table = litert.markdown(runs)
    assert "| 1x16, int8 | 90% | 92.0 ± 1.2 | 0.25 | 3.0 |" in table
    assert "| dense, float32 | 0% | 95.0 | 4.00 | 1.0 |" in table
    litert.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_trained_file_has_the_accuracy_of_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(litert.TASKS, "digits", (litert.TASKS["digits"][0], 2))
    line = litert.run("digits", "1x16", 0.8, seed=0)
    file = line["files"]["int8"]
    assert file["accuracy"] > 70
    assert file["size"] < 400_000  # dense int8 weights take 1.1 MB
    assert {"this file", "dense int8", "dense float32"} <= file["seconds"].keys()

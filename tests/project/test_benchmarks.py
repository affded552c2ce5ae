"""The benchmarks: that the peers do what they stand for, and that every case runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import safe_core
from safe_core import ADMM, project
from safe_core.adapters.torch.blocks import prune_blocks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    blocks,
    byte_llama,
    corpus,
    elsa,
    litert,
    peers,
    pruning_tables,
    savings,
    smaller_networks,
    smollm2,
    steps,
)
from benchmarks.iterative import IterativeSAM  # noqa: E402
from benchmarks.report import plot, tables  # noqa: E402
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
    named = ["--case", "selection", "--case", "memory", "--case", "reading", "--case", "torch"]
    named += ["--case", "block", "--case", "report", "--case", "loading"]
    command = [sys.executable, "-m", "benchmarks", "--quick", *named, "--json", tmp_path / "r.json"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert "| CPU |" in finished.stdout
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

"""Reports of studies: tables, figures, and quotes from the paper."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from small_recipe import TINY, changed
from typer.testing import CliRunner

import safe_core.study.runner.figures as figures
from safe_core.command_line.app import app
from safe_core.study.runner import cells, parse_recipe, write_report
from safe_core.study.runner.cells import Cell
from safe_core.study.runner.results import append_line, read_results
from safe_core.study.runner.statistics import agreement


def test_command_line_from_recipe_to_report(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(
        changed("seeds = [0, 1]", "seeds = [0]")
        .replace("[0.8, 0.9]", "[0.9]")
        .replace(", 0.5]", "]")
        .replace('"0.8" = 1e-2, ', "")
        + "[evaluation]\nhistory_epochs = 1\nweight_bins = 5\nlandscape_points = 3\n"
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["study", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "2/2 SAFE at 0.9, seed 0, torch" in result.stderr
    recipe = parse_recipe(path.read_text())
    found = read_results(out, recipe).results
    safe = found[Cell("torch", 0.0, "SAFE", 0.9, 0)]
    assert safe["zeros"] == int(0.9 * safe["weights"])
    assert [point["epoch"] for point in safe["history"]] == [1, 2]
    assert safe["history"][-1]["accuracy"] == safe["accuracy"]
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    assert f"| SAFE | {safe['accuracy']:.2f} |" in result.stdout
    figures = {p.name for p in out.glob("*.p[dn][fg]")}
    wanted = {"accuracy", "history_distance_0.9", "landscape", "weights"}
    assert {f"{name}.{kind}" for name in wanted for kind in ("png", "pdf")} <= figures
    refused = CliRunner().invoke(app, ["study", "table-99"])
    assert refused.exit_code == 1
    assert "recipe must be an existing file, or one of adasap, adasap-digits, " in refused.stderr


def made_results(out: Path) -> None:
    """Three methods, two seeds and a quote; one seed of the last method diverged."""
    source = TINY.replace(", 0.5]", "]") + '[[methods]]\nmethod = "admm"\nlabel = "AD_MM"\n'
    quote = '[[quoted]]\nsource = "Lee"\nmethod = "{0}"\nnoise = {1}\nvalues = {2}\n'
    source += quote.format("PBW", 0, '{"0.90" = [99.0, 0.25]}')
    source += quote.format("Elsewhere", 0.25, '{"0.9" = 1}') + quote.format("At", 0, '{"0.7" = 1}')
    (out / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    means = {"dense": 98.0, "SAFE": 97.0, "AD_MM": 95.0}
    for cell in cells(recipe):
        result: dict[str, Any] = {"accuracy": means[cell.method] + cell.seed}
        if cell.method == "AD_MM" and cell.sparsity == 0.9 and cell.seed:
            result = {"diverged": True, "losses": []}
        append_line(out / "results.jsonl", recipe, cell, result)


def test_report(tmp_path: Path) -> None:
    made_results(tmp_path)
    files = write_report(tmp_path)
    assert all(file.stat().st_size for file in files)
    markdown = (tmp_path / "report.md").read_text()
    assert "| dense | 98.50 ± 0.50 | 98.50 ± 0.50 |" in markdown
    assert "| SAFE | **97.50 ± 0.50** | **97.50 ± 0.50** |" in markdown
    assert r"| AD\_MM | 95.50 ± 0.50 | 95.00 (1) |" in markdown
    assert "| PBW (quoted 1) | - | 99.00 ± 0.25 |" in markdown
    assert "Elsewhere" not in markdown
    assert "At (quoted" not in markdown
    assert "\nMean and standard error over 2 seeds;" in markdown
    assert "quoted 1: from Lee, not measured here" in markdown
    latex = (tmp_path / "report.tex").read_text()
    assert r"SAFE & $\mathbf{97.50}$ & $0.50$ & $\mathbf{97.50}$ & $0.50$ \\" in latex
    assert r"AD\_MM & $95.50$ & $0.50$ & \multicolumn{1}{r@{}}{$95.00$} & (1) \\" in latex
    assert r"method & \multicolumn{2}{c}{80\%} & \multicolumn{2}{c}{90\%} \\" in latex
    assert r"\label{tab:tiny-accuracy}" in latex
    assert (tmp_path / "results.csv").read_text().count("AD_MM,0.9") == 2


def test_figures_of_sweeps(tmp_path: Path) -> None:
    swept = '[[methods]]\nmethod = "admm"\nlabel = "{0}"\nscope = "{1}"\nsweep = {2}\n'
    source = TINY.split("[[methods]]")[0].replace(", 0.5]", "]") + '[[methods]]\nmethod = "dense"\n'
    source += swept.format("A", "global", "{ penalty = [0.1, 1, 10] }")
    source += swept.format("B", "row", "{ penalty = [1, 0.1] }")
    source += swept.format("C", "row", "{ relaxation = [0.5, 1] }\npenalty = 0.1")
    recipe = parse_recipe(source)
    by_label = {entry.label: 50.0 + i for i, entry in enumerate(recipe.methods)}
    assert [entry.family for entry in recipe.methods] == ["dense", *"AAABBCC"]
    results = {c: {"accuracy": by_label[c.method], "distance": 1.0} for c in cells(recipe)}
    results |= {c: {"diverged": True} for c in results if c.method == "B, penalty = 0.1"}
    found = figures._metrics(recipe, results, "")
    assert list(found) == ["accuracy_by_penalty", "accuracy_by_relaxation"]
    (axes,) = found["accuracy_by_penalty"].axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert lines["A, 80%"] == [[0.1, 51.0], [1.0, 52.0], [10.0, 53.0]]
    np.testing.assert_equal(lines["B, 90%"], [[1.0, 54.0], [0.1, np.nan]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "1", "10"]
    half = {c: r for c, r in results.items() if c.method in ("dense", "A, penalty = 1")}
    (axes,) = figures._metrics(recipe, half, "")["accuracy_by_penalty"].axes
    assert [c.get_label() for c in axes.containers] == ["A, 80%", "A, 90%"]


def test_report_of_a_part(tmp_path: Path) -> None:
    source = changed('"SAFE"', '"S|{_}^2\\\\"').replace(", 0.5]", "]")
    (tmp_path / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    for cell in cells(recipe)[:3]:
        append_line(tmp_path / "results.jsonl", recipe, cell, {"accuracy": 50.0})
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert r"| S\|{\_}^2\\ | 50.00 | - |" in markdown
    assert "\nMean and standard error over 1 to 2 of 2 seeds." in markdown
    name = r"S\textbar{}\{\_\}\textasciicircum{}2\textbackslash{} &"
    assert name in (tmp_path / "report.tex").read_text()


def test_methods_within_the_error_of_the_best_are_marked_alike(tmp_path: Path) -> None:
    source = TINY.replace(", 0.5]", "]") + "".join(
        f'[[methods]]\nmethod = "admm"\nlabel = "{name}"\n' for name in ("close", "far")
    )
    metrics = '[report]\nmetrics = ["accuracy", "distance", "seconds"]\n'
    means = {"dense": 99.0, "SAFE": 97.0, "close": 96.5, "far": 95.0}
    made(
        tmp_path,
        source + metrics,
        lambda c: {"accuracy": means[c.method] + c.seed, "distance": 1.0 + c.seed, "seconds": 3.0},
    )
    report = (tmp_path / "report.md").read_text()
    assert "| SAFE | **97.50 ± 0.50** |" in report
    assert "| close | **97.00 ± 0.50** |" in report
    assert "| far | 95.50 ± 0.50 |" in report
    assert "**1.50" not in report
    assert "**3.00" not in report
    ranked = metrics + 'ranked = ["seconds"]\n'
    (tmp_path / "recipe.toml").write_text(source + ranked)
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "**97.50" not in report
    assert "**3.00 ± 0.00**" in report


def made(out: Path, source: str, result: Any) -> None:
    """Write a study with a result for every run, and its report."""
    (out / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    for cell in cells(recipe):
        append_line(out / "results.jsonl", recipe, cell, result(cell))
    write_report(out)


def test_a_column_has_one_number_of_decimals(tmp_path: Path) -> None:
    source = TINY.replace(", 0.5]", "]") + '[report]\nmetrics = ["distance"]\n'
    sizes = {"dense": 0.0, "SAFE": 0.0456}
    made(tmp_path, source, lambda c: {"accuracy": 9.0, "distance": sizes[c.method] + 12 * c.seed})
    report = (tmp_path / "report.md").read_text()
    assert "| dense | 6.00 ± 6.00 |" in report
    assert "| SAFE | 6.05 ± 6.00 |" in report


def test_a_method_has_one_colour_in_every_figure(tmp_path: Path) -> None:
    source = TINY.replace(", 0.5]", "]") + '[[methods]]\nmethod = "admm"\nlabel = "ADMM"\n'
    source += "[evaluation]\nhistory_epochs = 1\nweight_bins = 2\n"
    recipe = parse_recipe(source)
    points = [
        {"epoch": i, "accuracy": 50.0, "dense_accuracy": 50.0, "distance": 1.0} for i in (1, 2)
    ]
    result = {
        "accuracy": 50.0,
        "history": points,
        "weights_histogram": {"counts": [1, 2], "edges": [-1, 0, 1]},
    }
    results = dict.fromkeys(cells(recipe), result)
    drawn = figures._metrics(recipe, results, "")
    drawn |= figures._histories(recipe, results, "") | figures._of_first_seed(recipe, results, "")
    colours: dict[str, set[Any]] = {}
    for figure in drawn.values():
        assert figure.get_figwidth() == 3.3
        (axes,) = figure.axes
        handles = axes.get_legend_handles_labels()
        for handle, label in zip(*handles, strict=True):
            line = handle.lines[0] if hasattr(handle, "lines") else handle
            get = getattr(line, "get_color", None) or line.get_edgecolor
            colours.setdefault(label, set()).add(to_hex(get()))
    assert {label: len(found) for label, found in colours.items()} == {
        "dense": 1, "SAFE": 1, "ADMM": 1,
    }  # fmt: skip
    assert len(set.union(*colours.values())) == 3
    history = drawn["history_accuracy_0.9"].axes[0]
    assert len(history.collections) == 3  # a band for each method
    short = {cell: {**result, "history": points[:1]} for cell in results}
    assert figures._histories(recipe, short, "") == {}


def test_one_sparsity_gives_points_by_method() -> None:
    source = changed("[0.8, 0.9]", "[0.9]").replace('"0.8" = 1e-2, ', "").replace(", 0.5]", "]")
    recipe = parse_recipe(source)
    results = {cell: {"accuracy": 50.0 + cell.seed} for cell in cells(recipe)}
    (axes,) = figures._metrics(recipe, results, "")["accuracy"].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["SAFE", "dense"]
    assert all(c.lines[0].get_linestyle() == "None" for c in axes.containers)


HOSTILE = "<script>x</script> *a* [l](http://x) `c` $b$ a|b _u_ \\\\input{x} #1 & %"


@pytest.mark.long
def test_names_and_titles_are_shown_as_they_are(tmp_path: Path) -> None:
    source = changed(", 0.5]", "]")  # One noise has half the figures.
    source = source.replace('"SAFE"', f'"{HOSTILE}"').replace('"Tiny"', f'"{HOSTILE}"')
    source += "[evaluation]\nhistory_epochs = 1\nweight_bins = 2\nlandscape_points = 2\n"
    plane = {"coordinates": [-1, 1], "values": [[0, 1], [1, 2]]}
    points = [
        {"epoch": i, "accuracy": 50.0, "dense_accuracy": 50.0, "distance": 1.0} for i in (1, 2)
    ]
    result = {
        "accuracy": 50.0,
        "history": points,
        "weights_histogram": {"counts": [1, 2], "edges": [-1, 0, 1]},
        "landscape": plane,
    }
    made(tmp_path, source, lambda _: result)
    report = (tmp_path / "report.md").read_text()
    assert "<script>" not in report
    assert (
        report.count(r"&lt;script&gt;x&lt;/script&gt; \*a\* \[l\](http://x) \`c\` \$b\$ a\|b") >= 3
    )
    latex = (tmp_path / "report.tex").read_text()
    assert r"\input" not in latex
    assert r"\textbackslash{}input\{x\} \#1 \& \%" in latex
    for bad in ("two\\nlines", "bell\\u0007", "\\u202Eturned"):
        with pytest.raises(ValueError, match="must be one line of printable characters"):
            parse_recipe(changed('"Tiny"', f'"{bad}"'))


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"settings": {}, "cell": {"framework": "torch"}, "result": {}}',
        {"accuracy": "97"},
        {"accuracy": None},
        {"accuracy": True},
        {"accuracy": 101.0},
        {"accuracy": [97.0]},
        {},
        {"accuracy": 97.0, "distance": {}},
        {"accuracy": 97.0, "history": [{"epoch": 1}]},
        {"accuracy": 97.0, "losses": ["low"]},
        {"accuracy": 97.0, "landscape": {"coordinates": [0, 1], "values": [[1, 2], [3]]}},
        {"accuracy": 97.0, "landscape": {"coordinates": "here"}},
        {"accuracy": 97.0, "weights_histogram": {"counts": [1]}},
        {"accuracy": 10**400},
    ],
    ids=str,
)
def test_garbage_in_results_names_file_and_line(tmp_path: Path, line: Any) -> None:
    (tmp_path / "recipe.toml").write_text(TINY)
    recipe = parse_recipe(TINY)
    file, (first, second, *_) = tmp_path / "results.jsonl", cells(recipe)
    append_line(file, recipe, first, {"accuracy": 50.0})
    if isinstance(line, bytes):
        file.write_bytes(file.read_bytes() + line[:200_000] + b"\n")
    else:
        append_line(file, recipe, second, line)
    with pytest.raises(ValueError, match=r"results\.jsonl must hold one result .* line 2 is not"):
        write_report(tmp_path)


def test_report_by_noise_and_metric(tmp_path: Path) -> None:
    source = TINY + '[report]\nrows = ["sparsity", "method"]\ncolumns = "noise"\n'
    source += 'metrics = ["accuracy", "distance"]\n'
    (tmp_path / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    for cell in cells(recipe):
        result = {"accuracy": 50 + 10 * cell.noise + cell.seed, "distance": 0.0123}
        append_line(tmp_path / "results.jsonl", recipe, cell, result)
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "**Tiny: accuracy, %**" in markdown
    assert "| sparsity | method | 0% label noise | 50% label noise |" in markdown
    assert "| 80% | SAFE | 50.50 ± 0.50 | 55.50 ± 0.50 |" in markdown
    assert "| 80% | SAFE | 0.0123 ± 0.0000 | 0.0123 ± 0.0000 |" in markdown


def test_report_tells_where_the_frameworks_differ(tmp_path: Path) -> None:
    source = TINY.replace('["torch"]', '["torch", "jax"]').replace(", 0.5]", "]")
    recipe = parse_recipe(source)
    means = {  # (PyTorch, JAX) of the first seed; that of the second is 2 higher
        ("dense", None): (93.0, 93.9),
        ("SAFE", 0.8): (90.0, 94.3),  # three joint standard errors are 4.24
        ("SAFE", 0.9): (90.0, 94.2),
    }
    results = {
        cell: {
            "accuracy": means[cell.method, cell.sparsity][cell.framework == "jax"] + 2 * cell.seed
        }
        for cell in cells(recipe)
    }
    found = agreement(recipe, results)
    assert (found.compared, round(found.largest, 9), found.apart) == (3, 4.3, ["SAFE at 80%"])
    alone = {cell: result for cell, result in results.items() if cell.framework == "torch"}
    assert agreement(recipe, alone) is None
    exact = {cell: {"accuracy": means[cell.method, cell.sparsity][0]} for cell in cells(recipe)}
    lost = {cell: {} if cell.method == "dense" else result for cell, result in exact.items()}
    assert agreement(recipe, lost).apart == []  # all seeds of both diverged
    key = next(c for c in lost if c.method == "SAFE" and c.framework == "jax")
    again = {**lost, **{c: {} for c in lost if c._replace(seed=0) == key._replace(seed=0)}}
    assert agreement(recipe, again).apart == [f"SAFE at {100 * key.sparsity:g}%"]
    for cell, result in results.items():
        append_line(tmp_path / "results.jsonl", recipe, cell, result)
    (tmp_path / "recipe.toml").write_text(source)
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "PyTorch and JAX agree in 2 of 3 accuracies" in markdown
    assert markdown.endswith("They do not in: SAFE at 80%.\n")


def test_quotes_are_what_the_paper_prints() -> None:
    content = tomllib.loads((files("safe_core.study") / "recipes" / "table-2.toml").read_text())
    safe = [q for q in content["quoted"] if q["method"] == "SAFE" and q["noise"] == 0.75]
    assert safe[0]["values"]["0.9"] == [64.72, 0.61]


def test_a_report_leaves_a_line_that_is_being_written(tmp_path: Path) -> None:
    made_results(tmp_path)
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes() + b'{"recipe": "be')
    before = file.read_bytes()
    write_report(tmp_path)
    assert file.read_bytes() == before

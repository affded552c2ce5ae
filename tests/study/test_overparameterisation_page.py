"""Figures that the page on overparameterisation quotes are those of its tables."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
TEXT = " ".join((DOCS / "overparameterisation.md").read_text(encoding="utf-8").split())
TABLES = (DOCS / "overparameterisation_tables.md").read_text(encoding="utf-8")


def row(caption: str, first: str) -> list[str]:
    """The cells of the row that starts with some cells, in the table below a caption."""
    title = f"**SAM under overparameterisation, digits: {caption}**"
    assert TABLES.count(title) == 1
    lines = TABLES.split(title)[1].strip().split("\n\n")[0].splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {first} | ")]
    return found.removeprefix(f"| {first} | ").replace("*", "").strip(" |").split(" | ")


def test_gains_are_those_of_the_tables() -> None:
    for told, noise in (("clean", "0%"), ("half random", "50%")):
        first = f"SAM over SGD | {noise} label noise"
        gains = row("gain in accuracy, points", first)
        assert f"| {told} labels | {' | '.join(gains)} |" in TEXT
        radii = [f"{float(rho):g}" for rho in row("best rho by accuracy", first)]
        assert f"| best radius, {told} labels | {' | '.join(radii)} |" in TEXT
    sparse = [
        float(gain.split()[0])
        for score in ("Random", "SNIP")
        for noise in ("0%", "50%")
        for gain in row(
            "gain in accuracy, points", f"{score}, SAM over {score}, SGD | {noise} label noise"
        )[2:]
    ]
    assert max(sparse) < 0.2
    assert -6 < min(sparse) < -5.5
    assert "SAM gains at most 0.2 points over SGD in the wide sparse networks, and" in TEXT


def test_accuracies_are_those_of_the_tables() -> None:
    noisy, clean = (f"{noise}% label noise, accuracy, %" for noise in (50, 0))
    _, narrow, middle, wide = row(noisy, "SGD")
    assert f"{wide[:4]}% at 1.5 after {middle[:4]}% at 0.5" in TEXT
    random, snip = row(noisy, "Random, SGD"), row(noisy, "SNIP, SGD")
    dense = row(clean, "SGD")[1]
    for entry in (narrow, random[2], snip[3], dense):
        mean, error = map(float, entry.split(" ± "))
        assert f"{mean:.1f} ± {error:.1f}%" in TEXT
    lost = [float(row(caption, "Random, SGD")[3].split()[0]) for caption in (clean, noisy)]
    assert "{:.1f}% on clean and {:.1f}% on noisy labels".format(*lost) in TEXT


def test_moments_are_those_of_the_tables() -> None:
    for noise, rho, words in ((50, 0.2, "from {} to {} with"), (0, 0.1, "from {} to {} without")):
        caption = f"{noise}% label noise, second moment of Hessians"
        both = [float(row(caption, name)[3].split()[0]) for name in ("SGD", f"SAM, rho = {rho}")]
        assert words.format(*(f"{value:.2f}" for value in both)) in TEXT

"""Compare pruning methods on digits with the same tuning for each, and write docs/comparison*.

Every method of `TUNED` has one parameter and four values of it. At each sparsity and noise the
value with the highest accuracy on held-out training images is used, over three seeds that the
comparison does not use. The comparison then trains with three new seeds and measures on the test
images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_core.study.runner import run_study
from safe_core.study.runner.statistics import mean_and_error, percent

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
NOISES = (0.0, 0.5)
_ADMM = 'method = "admm"\npenalty = {}\n'
_SAFE = 'method = "safe"\nrho = 0.1\npenalty = {}\n'
_COSINE = 'penalty_schedule = "cosine"\n'
_GMP = 'method = "gmp"\nrise_epochs = {}\n'
PENALTIES, EPOCHS = (0.01, 0.03, 0.1, 0.3), (20, 30, 40, 50)
# By label: the table of a recipe, and the values of its one parameter.
TUNED: dict[str, tuple[str, tuple[float, ...]]] = {
    "magnitude, fine-tuned": (_GMP + "prune_every_epochs = {}\n", EPOCHS),
    "GMP": (_GMP + "prune_every_epochs = 2\n", EPOCHS),
    "ADMM, constant penalty": (_ADMM, PENALTIES),
    "ADMM, cosine penalty": (_ADMM + _COSINE, PENALTIES),
    "SAFE, cosine penalty": (_SAFE + _COSINE, PENALTIES),
}
_HEAD = """
title = "Comparison on digits"
frameworks = {frameworks}
sparsities = [{sparsity}]
seeds = {seeds}
data = {{ name = "digits", label_noise = [{noise}], validation = {validation} }}
model = {{ name = "lenet-300-100" }}

[training]
epochs = 60
batch_size = 64
learning_rate = 0.1
schedule = "cosine"
warmup_epochs = 5
momentum = 0.9
weight_decay = 1e-4
"""


def recipe(methods: Mapping[str, str], sparsity: float, noise: float, *, tuning: bool) -> str:
    """Return the recipe that trains these methods, given as tables by label."""
    head = _HEAD.format(
        frameworks='["torch"]',
        sparsity=sparsity,
        noise=noise,
        seeds=[3, 4, 5] if tuning else [0, 1, 2],
        validation=0.25 if tuning else 0.0,
    )
    tables = (f'[[methods]]\nlabel = "{label}"\n{table}' for label, table in methods.items())
    return "\n".join([head, *tables])


def setting(table: str, value: float) -> str:
    """Return a table with a value at each of its blanks."""
    return table.replace("{}", str(value))


def tuned(out: Path, sparsity: float, noise: float, jobs: int) -> dict[str, float]:
    """Return the value of each method with the best held-out accuracy, the lowest of equal ones."""
    tried = {
        f"{label} | {value}": setting(table, value)
        for label, (table, values) in TUNED.items()
        for value in values
    }
    source = recipe(tried, sparsity, noise, tuning=True)
    results = run_study(source, out, jobs=jobs)
    found = {}
    for label, (_, values) in TUNED.items():
        means = {v: _mean(results, f"{label} | {v}", "torch")[0] for v in values}
        found[label] = max(values, key=means.__getitem__)
    return found


def _mean(results: Mapping[Any, Any], label: str, framework: str) -> tuple[float, float]:
    """Return the mean accuracy and its error; a run that diverged counts as 0."""
    here = [r for c, r in results.items() if (c.method, c.framework) == (label, framework)]
    mean, error = mean_and_error([r.get("accuracy", 0.0) for r in here])
    return mean, error or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("study-results/compare"))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    for noise in NOISES:
        for sparsity in SPARSITIES:
            name = f"{percent(sparsity)}-{noise:g}"
            chosen = tuned(options.results / f"tuning-{name}", sparsity, noise, options.jobs)
            print(name, chosen, flush=True)
            methods = {"dense": 'method = "dense"\n', "one-shot": 'method = "magnitude"\n'} | {
                label: setting(TUNED[label][0], value) for label, value in chosen.items()
            }
            final = recipe(methods, sparsity, noise, tuning=False)
            results = run_study(final, options.results / name, jobs=options.jobs)
            for label in methods:
                print(label, *[_mean(results, label, f) for f in ("torch", "jax")], flush=True)


if __name__ == "__main__":
    main()

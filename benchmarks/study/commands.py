"""The commands ``safe-core study`` and ``safe-core report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safe_core.command_line.errors import needs

__all__ = ["report", "study"]


@needs("torch", "jax", "study")
def study(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file, or the name of an installed recipe.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; by default study-results/NAME."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data files; overrides that of the recipe.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device to train on, such as cpu or cuda.")] = "cpu",
) -> None:
    """Run a study: train and measure every combination in a recipe.

    A recipe lists methods, sparsities, seeds and frameworks. After an interruption, the same
    command runs what is left. Use safe-core report for tables and figures.
    """
    from safe_core.study.runner import recipe_source, run_study

    name, source = recipe_source(recipe)
    folder = Path("study-results", name) if out is None else out
    try:
        run_study(source, folder, folder=recipe.parent, jobs=jobs, data=data, device=device)
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command to continue", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"results in {folder}; tables and figures: safe-core report {folder}")


@needs("torch", "jax", "study")
def report(
    folder: Annotated[Path, typer.Argument(help="The results folder of a study, complete or not.")],
) -> None:
    """Write the tables (Markdown, LaTeX) and figures (PNG, PDF) of a study."""
    from safe_core.study.runner import write_report

    files = write_report(folder)
    typer.echo((folder / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"written to {folder}: {', '.join(file.name for file in files)}")

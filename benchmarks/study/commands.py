"""``safe-core study`` and ``safe-core report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safe_core.command_line.errors import needs

__all__ = ["report", "study"]


@needs("torch", "jax", "study")
def study(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file, or the name of a recipe that is installed.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; by default study-results/ and the name."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="Where the files of the data are, in place of the recipe's.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device to train on, as the framework calls it.")
    ] = "cpu",
) -> None:
    """Train and measure what a recipe asks for: method by sparsity by seed by framework.

    A study that was stopped goes on from where it was. Then see safe-core report.
    """
    from safe_core.study.runner import recipe_source, run_study

    name, source = recipe_source(recipe)
    folder = Path("study-results", name) if out is None else out
    try:
        run_study(source, folder, folder=recipe.parent, jobs=jobs, data=data, device=device)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on with what is left", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"results in {folder}; tables and figures: safe-core report {folder}")


@needs("torch", "jax", "study")
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study, finished or not.")],
) -> None:
    """Write the tables of a study as Markdown and LaTeX, and its figures as PNG and PDF."""
    from safe_core.study.runner import write_report

    files = write_report(folder)
    typer.echo((folder / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"Written in {folder}: {', '.join(file.name for file in files)}")

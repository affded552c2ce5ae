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
        Path | None, typer.Argument(help="A TOML file, or the name of an installed recipe.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the results; by default study-results/NAME."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data files; overrides that of the recipe.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="Device to train on, such as cpu or cuda; several for --jobs by comma."),
    ] = "cpu",
    shard: Annotated[
        str | None,
        typer.Option(help="Part of the study, such as 2/8; processes with others share --out."),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Run code outside the recipe's folder that the recipe names."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the study and list its runs; train nothing.")
    ] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list", help="List the installed recipes.")
    ] = False,
) -> None:
    """Run a study: train and measure every combination in a recipe.

    A recipe lists methods, sparsities, seeds and frameworks. After an interruption, the same
    command runs what is left. Use safe-core report for tables and figures. A recipe can name
    Python code beside it, which this command runs: read both before you run those of others.
    """
    from safe_core.study.runner import (
        FailedRunsError,
        installed_recipes,
        planned_runs,
        recipe_source,
        run_study,
    )

    if list_recipes:
        for name, title in installed_recipes().items():
            typer.echo(f"{name}: {title}")
        return
    if recipe is None:
        raise ValueError("recipe must be a TOML file or an installed recipe; see --list")
    name, source = recipe_source(recipe)
    folder = Path("study-results", name) if out is None else out
    beside = recipe.parent
    if dry_run:
        left, trainings = planned_runs(
            source, folder, folder=beside, data=data, device=device, shard=shard,
            allow_code=allow_code,
        )  # fmt: skip
        for cell in left:
            typer.echo(cell.title)
        typer.echo(f"{len(left)} runs are left, in {trainings} trainings; nothing was trained")
        return
    try:
        run_study(
            source, folder, folder=beside, jobs=jobs, data=data, device=device, shard=shard,
            allow_code=allow_code,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command to continue", err=True)
        raise typer.Exit(130) from None
    except FailedRunsError as error:
        typer.echo(f"safe-core: {error}\nthe tracebacks are in {folder}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"results in {folder}; tables and figures: safe-core report {folder}")


@needs("torch", "jax", "study")
def report(
    folder: Annotated[Path, typer.Argument(help="The results folder of a study, complete or not.")],
) -> None:
    """Write the tables (Markdown, LaTeX, CSV) and figures (PNG, PDF) of a study.

    This reads the recipe and the results, and runs no code that they name.
    """
    from safe_core.study.runner import write_report

    files = write_report(folder)
    typer.echo((folder / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"written to {folder}: {', '.join(file.name for file in files)}")

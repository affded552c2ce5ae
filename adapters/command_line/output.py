"""What commands print."""

from __future__ import annotations

import sys

import typer

__all__ = ["quiet_transformers", "say", "show"]


def say(text: str) -> None:
    """Print a message to standard error, apart from the results."""
    typer.echo(text, err=True)


def show(table: object) -> None:
    """Print something that rich draws, such as a table, to standard output."""
    from rich.console import Console

    # Markup and emoji codes stay off: names of tensors may hold brackets and colons.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and rich would cut names at 80 columns
    console.print(table)


def quiet_transformers() -> None:
    """Turn off the progress bars of transformers, unless standard error is a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

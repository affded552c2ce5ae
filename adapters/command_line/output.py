"""Print results and messages."""

from __future__ import annotations

import sys

import typer

__all__ = ["quiet_transformers", "say", "show"]


def say(text: str) -> None:
    """Print a message to standard error, so that standard output holds only results."""
    typer.echo(text, err=True)


def show(table: object) -> None:
    """Print a table, or anything else that rich draws, to standard output."""
    from rich.console import Console

    # Names of tensors may contain brackets and colons, which rich would read as markup and emoji.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; rich would cut names at 80 columns
    console.print(table)


def quiet_transformers() -> None:
    """Turn off the progress bars of transformers, unless standard error is a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

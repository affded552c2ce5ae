"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Device", "Json", "Trust"]

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Device = Annotated[str, typer.Option(help='A device of torch, or "auto" for a GPU if any.')]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

"""``safe-core inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import needs
from ..options import Json
from ..output import show

__all__ = ["inspect"]


@needs("transformers")
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A folder of a model, a safetensors file or one of torch.")
    ],
    as_json: Json = False,
) -> None:
    """Show what is sparse in a checkpoint, tensor by tensor, and what that saves.

    Zeros are counted exactly, and patterns hold exactly. Ties are entries of the smallest
    magnitude above zero.
    """
    from ..inspection import inspect_checkpoint

    report = inspect_checkpoint(path)
    if as_json:
        typer.echo(json.dumps(report.plain(), indent=2))
    else:
        show(report.table())

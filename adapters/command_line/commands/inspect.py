"""The command ``safe-core inspect``."""

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
        Path,
        typer.Argument(help="A model folder, a safetensors or GGUF file, or a PyTorch checkpoint."),
    ],
    as_json: Json = False,
) -> None:
    """Show the sparsity of every tensor of a checkpoint, and how far it can be compressed.

    Zeros are counted exactly. A pattern such as 2:4 is shown only if the whole tensor follows
    it. Ties are the entries that share the smallest magnitude above zero.
    """
    from ..inspection import inspect_checkpoint

    report = inspect_checkpoint(path)
    if as_json:
        typer.echo(json.dumps(report.plain(), indent=2))
    else:
        show(report.table())

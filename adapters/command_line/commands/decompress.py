"""The command ``safe-core decompress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import needs
from ..output import say

__all__ = ["decompress"]


@needs("transformers")
def decompress(
    folder: Annotated[Path, typer.Argument(help="A folder that `safe-core compress` wrote.")],
    out: Annotated[Path, typer.Option(help="A new folder for the model with its zeros.")],
) -> None:
    """Restore the model folder that `safe-core compress` compressed, for transformers.

    The weights have the bits and the files of before. The new files are read back and compared.
    """
    from ..compression import decompress_folder

    typer.echo(decompress_folder(folder, out, say=say).summary())

"""The command ``safe-core compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import needs
from ..output import say

__all__ = ["compress"]


@needs("transformers")
def compress(
    folder: Annotated[Path, typer.Argument(help="A model folder with safetensors files.")],
    out: Annotated[Path, typer.Option(help="A new folder for the compressed model.")],
) -> None:
    """Store the weights of a model folder without their zeros, bit for bit.

    Each tensor takes the smallest form: as it is, its non-zero entries with a bit for each entry,
    or two of every four entries. The other files are copied. The new files are read back and
    compared. load_compressed loads them, and `safe-core decompress` restores a folder for
    transformers.
    """
    from ..compression import compress_folder

    typer.echo(compress_folder(folder, out, say=say).summary())

"""The command ``safe-core advise``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import needs
from ..options import GgufFile, Json, Trust

__all__ = ["advise"]


@needs("transformers", "litert", "channels")
def advise(
    source: Annotated[
        str,
        typer.Argument(
            help="file.py:function or module:function, which returns a model and example inputs, "
            "or a folder with a causal language model."
        ),
    ],
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Samples of a call; may be repeated.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Fraction of zeros; may be repeated.  [default: 0.8, 0.9, 0.95]"),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help="Form to measure beside the dense ones, such as 1x16; may be repeated."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed samples of each form.")] = 9,
    length: Annotated[int, typer.Option(help="Tokens of a sample, for a model folder.")] = 128,
    device: Annotated[
        str | None, typer.Option(help="PyTorch device; by default that of the model.")
    ] = None,
    gguf_file: GgufFile = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure in which forms zeros would pay on this machine, and say what to train.

    Random weights replace those of the linear layers, so the model need not be trained. A function
    must return a PyTorch model and example inputs, an NNX module and example inputs, or a Linen
    module, example inputs and variables. Its file is run.
    """
    from ..advice import advice
    from ..progress_bar import counted

    with counted("parts") as progress:
        found = advice(
            source,
            batch_sizes=batch_size or None,
            sparsities=sparsity or None,
            forms=form or None,
            repeats=repeats,
            length=length,
            device=device,
            gguf_file=gguf_file,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    typer.echo(json.dumps(found.plain(), indent=2) if as_json else str(found))

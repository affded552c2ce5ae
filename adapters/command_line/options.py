"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["ChatTemplate", "Device", "Field", "GgufFile", "Json", "Trust"]

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model folder.")
]
GgufFile = Annotated[
    str | None,
    typer.Option(help="The GGUF file of the model folder to load; by default the only one."),
]
Device = Annotated[str, typer.Option(help='PyTorch device, or "auto" for a GPU if there is one.')]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, with all figures.")]
Field = Annotated[
    str | None,
    typer.Option(
        help="The field or column with the text, in JSON and parquet files; by default text, or "
        "messages with --chat-template."
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template",
        help="Make a text of each list of messages by the tokenizer's chat template.",
    ),
]

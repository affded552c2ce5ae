"""The command ``safe-core perplexity``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import needs
from ..options import ChatTemplate, Device, Field, GgufFile, Json, Trust
from ..output import naming_options, printable, quiet_transformers

__all__ = ["perplexity"]


@needs("transformers")
def perplexity(
    model: Annotated[Path, typer.Argument(help="A folder with a causal language model.")],
    text: Annotated[
        list[Path],
        typer.Option(help="A text of UTF-8, JSON lines (.jsonl) or parquet; may be repeated."),
    ],
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the starts of windows; by default --length.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per batch.")] = 1,
    field: Field = None,
    chat_template: ChatTemplate = False,
    gguf_file: GgufFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a causal language model on a text.

    The text is cut into windows without overlap, as in papers on pruning. With --stride below
    --length, windows overlap and each scores only its new tokens.
    """
    from ..model_folder import chosen_device, load_model, load_tokenizer
    from ..perplexity import check_length, text_tokens
    from ..perplexity import perplexity as measured
    from ..progress_bar import counted

    quiet_transformers()
    where = chosen_device(device)
    tokenizer = load_tokenizer(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    tokens = text_tokens(tokenizer, text, field, chat_template=chat_template)
    loaded = load_model(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code).to(where)
    check_length(loaded, length)
    try:
        with counted("windows") as progress:
            found = measured(loaded, tokens, length, stride, batch_size, progress=progress)
    except ValueError as wrong:
        raise ValueError(naming_options(str(wrong), "length")) from wrong
    if as_json:
        typer.echo(json.dumps(found._asdict()))
    else:
        error = "" if found.standard_error is None else f" ± {found.standard_error:.2g}"
        names = ", ".join(file.name for file in text)
        typer.echo(
            f"perplexity {found.perplexity:.4f}{error} (loss {found.loss:.6f}) of "
            f"{printable(str(model))} on {printable(names)}, "
            f"{found.predictions:,} predictions in {found.windows:,} windows, "
            f"{found.unused:,} tokens unused"
        )

"""The command line, ``safe-core``; what a command needs is imported as it runs."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

_INSTALL = 'pip install "safe-core[transformers]"'
_INSTALL_STUDY = 'pip install "safe-core[torch,jax,study]"'

try:
    import typer

    from safe_core.demo.cli import demo
except ImportError:
    raise SystemExit(f"safe-core: the command line needs typer: {_INSTALL}") from None

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Sparse and flat neural networks, for JAX and PyTorch."""


app.command()(demo)


class Scope(enum.StrEnum):
    """Where entries compete."""

    tensor = "tensor"
    row = "row"


class Targets(enum.StrEnum):
    """What the blocks before give, as blocks are reconstructed."""

    pruned = "pruned"
    dense = "dense"


class Offload(enum.StrEnum):
    """Where activations lie."""

    cpu = "cpu"
    disk = "disk"
    none = "none"


Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Device = Annotated[str, typer.Option(help='A device of torch, or "auto" for a GPU if any.')]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
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
    with _clear_errors():
        from .inspection import inspect_checkpoint

        report = inspect_checkpoint(path)
        if as_json:
            typer.echo(json.dumps(report.plain(), indent=2))
        else:
            _print(report.table())


@app.command()
def perplexity(
    model: Annotated[Path, typer.Argument(help="A folder with a causal language model.")],
    text: Annotated[list[Path], typer.Option(help="A UTF-8 text file; may be given again.")],
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window; by default the length.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 1,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a model on a text.

    The text is cut into windows without overlap, as papers on pruning do it; with a smaller
    stride each window scores only its new tokens.
    """
    with _clear_errors():
        from .model_folder import chosen_device, load_model, load_tokenizer
        from .perplexity import check_length, perplexity, text_tokens
        from .progress_bar import counted

        _quiet()
        where = chosen_device(device)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        tokens = text_tokens(tokenizer, text)
        loaded = load_model(model, trust_remote_code=trust_remote_code).to(where)
        check_length(loaded, length)
        with counted("windows") as progress:
            found = perplexity(loaded, tokens, length, stride, batch_size, progress=progress)
        if as_json:
            typer.echo(json.dumps(found._asdict()))
        else:
            typer.echo(
                f"perplexity {found.perplexity:.4f} (loss {found.loss:.6f}), {found.predictions:,} "
                f"predictions in {found.windows:,} windows, {found.unused:,} tokens unused"
            )


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="A folder with a causal language model.")],
    calibration: Annotated[list[Path], typer.Option(help="A UTF-8 text file; may be repeated.")],
    out: Annotated[Path, typer.Option(help="A new folder for the sparse model.")],
    sparsity: Annotated[
        str, typer.Option(help="The share of zeros in each weight, 0.5, or N:M, 2:4.")
    ] = "0.5",
    method: Annotated[
        str, typer.Option(help="safe+, safe, alps, sparsegpt, wanda or magnitude.")
    ] = "safe+",
    scope: Annotated[
        Scope | None,
        typer.Option(help="Where entries compete: in a weight, or in each of its outputs."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the windows and of the order of samples.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the samples, by safe and safe+; else 30.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of safe and safe+; else 0.0002.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 8,
    targets: Annotated[
        Targets, typer.Option(help="Reconstruct what a block gives for pruned or dense inputs.")
    ] = Targets.pruned,
    offload: Annotated[
        Offload, typer.Option(help="Where activations lie; none: on the device.")
    ] = Offload.cpu,
    work_dir: Annotated[
        Path | None, typer.Option(help="A folder from which the same command goes on.")
    ] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Prune a transformer block by block with a calibration text, and save it.

    The new folder holds the weights, the tokenizer and a model card with all settings, and
    loads as the old one does. Without training, alps is the most accurate and magnitude the
    fastest; safe+ trains each block.
    """
    with _clear_errors():
        from .progress_bar import pruning_bar
        from .pruning import PruningJob, prune_folder

        _quiet()
        job = PruningJob(
            model=model,
            calibration=calibration,
            sparsity=sparsity,
            method=method,
            scope=None if scope is None else scope.value,
            samples=samples,
            length=length,
            seed=seed,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            targets=targets.value,
            offload=offload.value,
            work_dir=work_dir,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        with pruning_bar() as progress:
            result = prune_folder(job, out, progress=progress, say=_say)
        _print(result.table())
        for name in result.report.dense:
            typer.echo(f"left dense, for no product was seen to take it: {name}")
        lost = [block.name for block in result.report.blocks if block.relative_error > 1]
        if lost:
            _say(
                f"warning: {', '.join(lost)} differ from the dense model by more than their whole "
                "output; a lower --learning-rate or sparsity may help"
            )
        typer.echo(f"saved in {result.out}")


@app.command()
def study(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file, or the name of a recipe that is installed.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; by default study-results/ and the name."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="Where the files of the data are, in place of the recipe's.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device to train on, as the framework calls it.")
    ] = "cpu",
) -> None:
    """Train and measure what a recipe asks for: method by sparsity by seed by framework.

    A study that was stopped goes on from where it was. Then see safe-core report.
    """
    with _clear_errors(_INSTALL_STUDY):
        from safe_core.study.runner import recipe_source, run_study

        name, source = recipe_source(recipe)
        folder = Path("study-results", name) if out is None else out
        try:
            run_study(source, folder, folder=recipe.parent, jobs=jobs, data=data, device=device)
        except KeyboardInterrupt:
            _say("stopped; the same command goes on with what is left")
            raise typer.Exit(130) from None
        typer.echo(f"results in {folder}; tables and figures: safe-core report {folder}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study, finished or not.")],
) -> None:
    """Write the tables of a study as Markdown and LaTeX, and its figures as PNG and PDF."""
    with _clear_errors(_INSTALL_STUDY):
        from safe_core.study.runner import write_report

        files = write_report(folder)
        typer.echo((folder / "report.md").read_text(encoding="utf-8"))
        typer.echo(f"Written in {folder}: {', '.join(file.name for file in files)}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print(thing: object) -> None:
    from rich.console import Console

    # Names come from files, where brackets and colons are no markup.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and no name should be cut there
    console.print(thing)


@contextmanager
def _clear_errors(install: str = _INSTALL) -> Iterator[None]:
    """Show what was wrong with the input as a message, not as a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"safe-core: this command needs {error.name}: {install}", err=True)
        raise typer.Exit(1) from None
    except (ValueError, TypeError, OSError) as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        typer.echo(f"safe-core: {error}{notes}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which may not be imported
            raise
        typer.echo(f"safe-core: {error}\nTry a smaller --batch-size.", err=True)
        raise typer.Exit(1) from None


def _quiet() -> None:
    """Let transformers draw its bars on a terminal only."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    app()

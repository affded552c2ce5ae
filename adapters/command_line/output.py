"""Print results and messages."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from safe_core._checks import printable

__all__ = [
    "as_given",
    "by_option",
    "naming_options",
    "numbers_left_out",
    "numbers_listed",
    "printable",
    "quiet_transformers",
    "say",
    "show",
    "spread",
]


def as_given(context: typer.Context) -> str:
    """Return the command line of a command, quoted for a shell, without options left out."""
    words = ["safe-core", str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            words += map(str, values)
        elif isinstance(value, bool):
            words.append(parameter.opts[0])
        else:
            words += [word for x in values for word in (parameter.opts[0], str(x))]
    return shlex.join(words)


def by_option(reason: str) -> str:
    """Return a reason or an error of block-wise pruning in the words of the command line.

    Examples
    --------
    >>> by_option("where= leaves it out"), by_option("choose others with blocks=")
    ('--only or --ignore leaves it out', 'choose others with --blocks')
    """
    plain = reason.replace("where=", "--only or --ignore").replace("blocks=", "--blocks")
    return plain.replace("sparsity gives it", "--sparsity gives it")


def naming_options(text: str, *names: str) -> str:
    """Return a message with options of the command line instead of keyword arguments.

    Examples
    --------
    >>> naming_options("a window of length=64: choose a smaller samples= or length=", "length")
    'a window of --length 64: choose a smaller samples= or --length'
    """
    return re.sub(
        rf"\b({'|'.join(names)})=(?=(\d?))",
        lambda found: f"--{found[1].replace('_', '-')}{' ' if found[2] else ''}",
        text,
    )


def numbers_left_out(name: str) -> str:
    """Return the name that weights of different blocks share in a table.

    Examples
    --------
    >>> numbers_left_out("layers.11.up.weight")
    'layers.*.up.weight'
    """
    return re.sub(r"\d+", "*", name)


def numbers_listed(names: Sequence[str]) -> str:
    """Return the names of some weights, which differ in numbers only, as one.

    Examples
    --------
    >>> numbers_listed([f"layers.{i}.up.weight" for i in (0, 1, 2, 5)])
    'layers.[0-2,5].up.weight'
    >>> numbers_listed(["layers.0.up.weight"])
    'layers.0.up.weight'
    """
    split = [re.split(r"(\d+)", name) for name in names]
    numbers = [parts[1::2] for parts in split]
    columns = [sorted(set(map(int, column))) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, columns)) != len(set(names)):
        return f"{names[0]}, ..."  # the lists alone would also stand for other weights
    parts = list(split[0])
    for i, column in enumerate(columns):
        if len(column) > 1:
            parts[2 * i + 1] = f"[{','.join(_ranges(column))}]"
    return "".join(parts)


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Yield the runs of consecutive numbers, such as "0-2" and "5"."""
    start = numbers[0]
    for n, following in itertools.zip_longest(numbers, numbers[1:]):
        if following != n + 1:
            yield f"{start}" if start == n else f"{start}-{n}"
            start = following


def spread(values: Sequence[float], form: str, short: str | None = None) -> str:
    """Return the least and the greatest of some values, or the one that all are.

    Examples
    --------
    >>> spread([0.5, 0.5], ".4%"), spread([0.25, 0.5], ".4%", ".0%")
    ('50.0000%', '25% to 50%')
    """
    least, most = min(values), max(values)
    if least == most:
        return f"{least:{form}}"
    return f"{least:{short or form}} to {most:{short or form}}"


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
    """Keep transformers off the network, and its progress bars off files and pipes."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

"""The command ``safe-core demo``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from safe_core._installed import require
from safe_core.command_line.errors import needs

__all__ = ["demo"]

_PACKAGES = {
    "torch": ("torch",),
    "jax": ("jax", "optax", "flax"),
    "demo": ("sklearn", "scipy", "matplotlib", "rich"),
}


class Framework(enum.StrEnum):
    """The framework to train with."""

    torch = "torch"
    jax = "jax"
    both = "both"


@needs("torch", "jax", "demo")
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Use one seed and two sparsities.")
    ] = False,
    framework: Annotated[Framework, typer.Option(help="Framework to train with.")] = Framework.both,
    output: Annotated[
        Path, typer.Option(help="Folder for the table and the figures.", file_okay=False)
    ] = Path("demo-results"),
    device: Annotated[str, typer.Option(help="Device to train on, such as cpu or cuda.")] = "cpu",
) -> None:
    """Compare dense, magnitude pruned, GMP, ADMM and SAFE networks on handwritten digits.

    Trains LeNet-300-100 at sparsities of 90, 95, 98 and 99%, with clean labels and with half of
    the labels random. Shows test accuracy, sharpness and zeros, and draws figures.
    """
    chosen = ("torch", "jax") if framework is Framework.both else (framework.value,)
    for extra in (*chosen, "demo"):
        # Raise for a missing package here rather than in a worker process.
        require("this command", *_PACKAGES[extra], extra=extra)
    from safe_core.demo.recipe import Recipe
    from safe_core.demo.run import demo as run_demo

    try:
        run_demo(Recipe.quick() if quick else Recipe(), chosen, output, device=device)
    except RuntimeError as error:
        typer.echo(f"safe-core: {error}", err=True)
        raise typer.Exit(1) from None

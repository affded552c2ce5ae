"""``safe-core prune``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import needs
from ..options import Device, Trust
from ..output import quiet_transformers, say, show

__all__ = ["prune"]


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


@needs("transformers")
def prune(
    model: Annotated[Path, typer.Argument(help="A folder with a causal language model.")],
    calibration: Annotated[list[Path], typer.Option(help="A UTF-8 text file; may be repeated.")],
    out: Annotated[Path, typer.Option(help="A new folder for the sparse model.")],
    sparsity: Annotated[
        str,
        typer.Option(help="Fraction of zeros in each weight (0.5), N:M (2:4), or file.py:PATTERN."),
    ] = "0.5",
    method: Annotated[
        str, typer.Option(help="safe+, safe, alps, sparsegpt, wanda, magnitude, or file.py:SOLVER.")
    ] = "safe+",
    scope: Annotated[
        Scope | None,
        typer.Option(help="Where entries compete: in a weight, or in each of its outputs."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the windows and of the order of samples.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the samples, for safe and safe+; 30.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate of safe and safe+; 0.0002.")
    ] = None,
    rho: Annotated[
        float | None, typer.Option(help="Perturbation radius of safe and safe+; 0.0002.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Penalty parameter of safe and safe+; 0.001.")
    ] = None,
    dual_update_interval: Annotated[
        int | None, typer.Option(help="Steps between dual updates of safe and safe+; 32.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 8,
    blocks: Annotated[
        str | None, typer.Option(help="Name of the list of blocks, such as model.layers.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Prune only weights whose name matches this expression.")
    ] = None,
    targets: Annotated[
        Targets,
        typer.Option(help="Reproduce the dense block's output for pruned or for dense inputs."),
    ] = Targets.pruned,
    propagate: Annotated[
        Targets, typer.Option(help="Feed blocks what the pruned or the dense ones before return.")
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
    from ..progress_bar import pruning_bar
    from ..pruning import PruningJob, prune_folder

    quiet_transformers()
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
        rho=rho,
        penalty=penalty,
        dual_update_interval=dual_update_interval,
        batch_size=batch_size,
        blocks=blocks,
        only=only,
        targets=targets.value,
        propagate=propagate.value,
        offload=offload.value,
        work_dir=work_dir,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with pruning_bar() as progress:
        result = prune_folder(job, out, progress=progress, say=say)
    show(result.table())
    for name in result.report.dense:
        typer.echo(f"not pruned: no matrix product used it: {name}")
    lost = [block.name for block in result.report.blocks if block.relative_error > 1]
    if lost:
        say(
            f"warning: {', '.join(lost)} differ from the dense model by more than their whole "
            "output; a lower --learning-rate or sparsity may help"
        )
    typer.echo(f"saved in {result.out}")

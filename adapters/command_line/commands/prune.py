"""``safe-core prune``."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from safe_core.solvers import named_solvers

from ..errors import needs
from ..options import ChatTemplate, Device, Field, GgufFile, Trust
from ..output import as_given, by_option, printable, quiet_transformers, say, show

__all__ = ["prune"]


class Scope(enum.StrEnum):
    """Name the pool that entries compete in."""

    tensor = "tensor"
    row = "row"


class Blocks(enum.StrEnum):
    """The blocks that hidden states come from."""

    pruned = "pruned"
    dense = "dense"


class Offload(enum.StrEnum):
    """Name the place that activations are kept in."""

    cpu = "cpu"
    disk = "disk"
    none = "none"


def by_reason(dense: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of dense matrices for each reason.

    Examples
    --------
    >>> by_reason({"a": "it is an embedding", "b": "where= leaves it out"})
    {'it is an embedding': ['a'], '--only or --ignore leaves it out': ['b']}
    """
    found: dict[str, list[str]] = {}
    for name, reason in dense.items():
        found.setdefault(by_option(reason), []).append(name)
    return found


def _show_dense(dense: Mapping[str, str]) -> None:
    for reason, names in by_reason(dense).items():
        shown = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
        typer.echo(f"not pruned, because {reason}: {shown} ({len(names):,} in all)")


@needs("transformers")
def prune(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A folder with a model of transformers.")],
    out: Annotated[Path, typer.Option(help="A new folder for the sparse model.")],
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="A text of UTF-8, JSON lines (.jsonl) or parquet; may be repeated."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a text: a .safetensors or .npz file of the model's arguments, such "
            "as pixel_values, with a sample in each row."
        ),
    ] = None,
    field: Field = None,
    chat_template: ChatTemplate = False,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            help="Fraction of zeros in each weight (0.5), N:M to keep N of every M (2:4), "
            "file.py:PATTERN, or owl:0.7 for blocks that differ by their outliers; again as "
            "REGEX=SPARSITY for weights with such a name.  [default: 0.5]"
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help=f"{', '.join(named_solvers())}, or file.py:SOLVER."),
    ] = "safe+",
    scope: Annotated[
        Scope | None,
        typer.Option(help="Where entries compete: in each weight, or in each of its outputs."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text, or rows of --inputs.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the windows and of the order of samples.")] = 0,
    blocks: Annotated[
        str | None,
        typer.Option(help="Name of the list of blocks; by default that with most parameters."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Regular expression: prune only weights with such a name.")
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(help="Regular expression: leave weights with such a name dense.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Methods that train: passes over the samples; 30 by default."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Methods that train: peak learning rate; by default 0.01 times the root mean "
            "square of the weights, or 0.0002 for the published methods."
        ),
    ] = None,
    rho: Annotated[
        float | None,
        typer.Option(
            help="Methods that train: perturbation radius; by default none, or 0.0002 for the "
            "published methods."
        ),
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(
            help="Methods that train: penalty lambda, in place of a pull; 0.001 by default for the "
            "published methods."
        ),
    ] = None,
    dual_update_interval: Annotated[
        int | None,
        typer.Option(
            help="Methods that train: steps between dual updates; by default derived from the "
            "number of steps, or 32 for the published methods."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Methods that train: the method whose solution training starts at, or dense; "
            "alps by default, or dense for the published methods."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 8,
    propagate: Annotated[
        Blocks, typer.Option(help="The inputs of a block: outputs of pruned or of dense blocks.")
    ] = Blocks.pruned,
    target_inputs: Annotated[
        Blocks, typer.Option(help="The inputs that the targets of a block are computed from.")
    ] = Blocks.pruned,
    offload: Annotated[
        Offload, typer.Option(help="Where activations are kept; none: on the device.")
    ] = Offload.cpu,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Under torchrun: share the optimizer state of a block among the processes.",
        ),
    ] = False,
    work_dir: Annotated[
        Path | None, typer.Option(help="A folder from which the same command resumes.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan, the memory and the time, which one pruned block of each kind "
            "measures, and write nothing.",
        ),
    ] = False,
    gguf_file: GgufFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Prune a transformer block by block with a calibration text or other inputs, and save it.

    The new folder holds the weights, the tokenizer and a model card with all settings. It loads
    like the old one. safe+ trains each block from the solution of alps, and keeps that solution
    where training does not improve it. Without training alps is the most accurate, and magnitude
    the fastest. safe-published and safe+-published train with the settings of the paper.

    On several GPUs or machines: torchrun --nproc-per-node 8 --no-python safe-core prune ...
    """
    from safe_core.adapters.torch.blocks.settings import PruningSettings

    from ..dry_run import plan_folder
    from ..launch import launched
    from ..progress_bar import pruning_bar
    from ..pruning import PruningJob, prune_folder

    quiet_transformers()
    with launched() as processes:
        job = PruningJob(
            model=model,
            calibration=calibration or [],
            sparsity=sparsity or ["0.5"],
            inputs=inputs,
            field=field,
            chat_template=chat_template,
            method=method,
            scope=None if scope is None else scope.value,
            samples=samples,
            length=length,
            only=only,
            ignore=ignore,
            epochs=epochs,
            learning_rate=learning_rate,
            rho=rho,
            penalty=penalty,
            dual_update_interval=dual_update_interval,
            start=start,
            settings=PruningSettings(
                propagate=propagate.value,
                target_inputs=target_inputs.value,
                batch_size=batch_size,
                seed=seed,
                blocks=blocks,
                device=device,
                offload=offload.value,
                work_dir=work_dir,
                shard=shard,
            ),
            gguf_file=gguf_file,
            trust_remote_code=trust_remote_code,
        )
        if dry_run:
            plan = plan_folder(job, out, say=say)
        else:
            with pruning_bar() as progress:
                result = prune_folder(
                    job, out, progress=progress, say=say, command=as_given(context)
                )
    if not processes.first:
        return
    if dry_run:
        show(plan.table())
        _show_dense(plan.dense)
        for line in plan.lines():
            typer.echo(line)
        return
    show(result.table())
    _show_dense(result.report.dense)
    poor = [block.name for block in result.report.blocks if block.relative_error > 1]
    if poor:
        say(
            f"warning: {', '.join(poor)} differ from the dense model by more than their whole "
            "output; a lower --learning-rate or sparsity may help"
        )
    if note := result.report.training_note:
        say(f"note: {note}; a lower --learning-rate or more --epochs may help")
    typer.echo(f"saved in {result.out}")

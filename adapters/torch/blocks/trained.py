"""The parameters of a block in training, whole in every process or shared by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .memory import copy_with
from .processes import Processes

__all__ = ["Shards", "Trained", "trained_parameters"]


class Trained:
    """The parameters that are trained, in every process a copy of all.

    Parameters
    ----------
    block : torch.nn.Module
        Parameters with ``requires_grad=True`` are trained.
    processes : Processes, optional

    Attributes
    ----------
    named : dict of str to torch.nn.Parameter
        What the optimizer trains.
    model : torch.nn.Module or None
        The module of the shards, which an optimizer of sharded parameters needs.

    Examples
    --------
    >>> list(Trained(nn.Linear(2, 1)).named)
    ['weight', 'bias']
    """

    def __init__(self, block: nn.Module, processes: Processes | None = None) -> None:
        self.processes = Processes() if processes is None else processes
        self.named = {name: p for name, p in block.named_parameters() if p.requires_grad}
        self.model: nn.Module | None = None

    def gather(self) -> None:
        """Bring the block to where the optimizer has moved the parameters."""

    def reduce(self) -> None:
        """Give the optimizer the gradients of the block, summed over the processes."""
        self.processes.sum_gradients(self.named.values())


class Shards(Trained):
    """The parameters that are trained, in every process a shard of each, as a `DTensor`.

    The state of the optimizer is sharded too. The block computes with whole parameters, so that
    it may use them in any way. They are gathered before each pass, and their gradients are
    scattered after it.
    """

    def __init__(self, block: nn.Module, processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        super().__init__(block, processes)
        self._whole = self.named
        device = next(iter(self._whole.values())).device
        self._mesh = init_device_mesh(device.type, (processes.size,))
        processes.meet()  # an error of another one ends this one before they exchange anything
        trained = set(self._whole.values())

        def share(t: Tensor) -> Tensor:
            if t not in trained:
                return t
            return distribute_tensor(t.detach(), self._mesh, [Shard(0)], src_data_rank=None)

        self.model = copy_with(block, share)
        self.named = {name: self.model.get_parameter(name) for name in self._whole}

    @torch.no_grad()
    def gather(self) -> None:
        """Copy all shards into the parameters of the block."""
        self.processes.meet()
        for name, p in self._whole.items():
            p.copy_(self.named[name].full_tensor())  # type: ignore[attr-defined]
        torch.clear_autocast_cache()  # of casts of the values before

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients of the block, each process those of its shards."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        self.processes.complete_gradients(self._whole.values())
        for name, p in self._whole.items():
            if p.grad is not None:
                part = DTensor.from_local(p.grad, self._mesh, [Partial()], run_check=False)
                gradient = part.redistribute(placements=[Shard(0)])
                shard = self.named[name]
                shard.grad = gradient if shard.grad is None else shard.grad + gradient
                p.grad = None  # free each one before the next is reduced


def trained_parameters(block: nn.Module, processes: Processes, *, shard: bool) -> Trained:
    """Return the parameters of a block that are trained, sharded over several processes or not.

    Examples
    --------
    >>> type(trained_parameters(nn.Linear(2, 1), Processes(), shard=True)).__name__
    'Trained'
    """
    return Shards(block, processes) if shard and processes.size > 1 else Trained(block, processes)

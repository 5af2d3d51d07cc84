"""Training in several processes that torchrun starts, on one machine or more; or in this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from common import choose_device
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` is 0 to `count` - 1; process 0 prints and writes the files."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are means over the processes."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def mean(self, value: Tensor) -> float:
        """Mean of a number over the processes."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value.item() / self.count

    def columns(self, x: Tensor) -> Tensor:
        """This process's share of x, `(…, B, …)` with the batch in dimension 1."""
        return x.chunk(self.count, dim=1)[self.rank].contiguous()

    def all_columns(self, x: Tensor) -> Tensor:
        """The shares of all processes, side by side."""
        if self.count == 1:
            return x
        shares = [torch.empty_like(x) for _ in range(self.count)]
        distributed.all_gather(shares, x.contiguous())
        return torch.cat(shares, dim=1)

    def read(self, path: Path) -> bytes | None:
        """Content of a file of the first process's machine, for all; None if there is none."""
        content = [path.read_bytes() if self.first and path.is_file() else None]
        if self.count > 1:
            distributed.broadcast_object_list(content, device=self.device)
        return content[0]


@contextmanager
def join(device_name: str) -> Iterator[Processes]:
    """Join the processes that torchrun has started: by NCCL on GPUs, by Gloo on CPUs."""
    if "LOCAL_RANK" not in os.environ:
        yield Processes(0, 1, choose_device(device_name))
        return
    if device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available()):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()

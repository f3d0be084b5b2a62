"""What one process and many have in common; with one, everything here is the identity."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels.train.errors import SetupError


def start() -> None:
    """Join the processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        there_are = torch.cuda.is_available()
        if there_are:  # or NCCL finds all processes on the first GPU
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if there_are else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is this process's GPU, or the CPU."""
    if name == "auto":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        name = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SetupError(f"training.device {name}: {str(error).splitlines()[0]}") from error
    return found


def wrap(module: nn.Module, on: torch.device) -> nn.Module:
    """The module whose gradients are averaged over the processes."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[on] if on.type == "cuda" else None)


def sum(value: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def mean(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean over the processes of some numbers, in one message."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, (sum(stacked) / world_size()).tolist(), strict=True))


def largest(value: int) -> int:
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def same_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first: each has seen other images."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def wait() -> None:
    if world_size() > 1:
        dist.barrier()


def agree(text: str) -> str:
    """What the first process says."""
    said = [text]
    if world_size() > 1:
        dist.broadcast_object_list(said, 0)
    return said[0]

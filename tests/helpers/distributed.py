"""Several processes on one machine: gloo, met through a file (no port, no network)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(worker: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """Run `worker(rank, world_size, *args)` in fresh processes with a process group; results in rank order.

    The worker must be importable (a function of a module), its result something `torch.load` reads with `weights_only`.
    """
    mp.spawn(_run_rank, args=(world_size, str(folder), worker, args), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, folder: str, worker: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        torch.save(worker(rank, world_size, *args), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()

"""Runs a function in several gloo processes."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(function, world_size, *args):
    """Call function(rank, world_size, *args) in each process and return the results in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (function, world_size, folder, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _process(rank, function, world_size, folder, args):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()

"""Runs a function in several gloo processes."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server imports these once, and every process is a copy of it: importing takes longer than most tests.
PRELOADED = ["pretrain", "train_caption", "train_retrieval", "train_nlvr", "train_vqa", "capfilt"]


def run_in_processes(function, world_size, *args):
    """Call function(rank, world_size, *args) in each process and return the results in order of rank."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        settings = (function, world_size, folder, dict(os.environ), args)
        mp.start_processes(_process, settings, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _process(rank, function, world_size, folder, environment, args):
    os.environ.update(environment)  # the server's is older
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()

"""Runs functions and scripts in several processes."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

# A server imports these once, and every process is a copy of it: importing takes longer than most tests.
PRELOADED = ["pretrain", "train_caption", "train_retrieval", "train_nlvr", "train_vqa", "capfilt", "predict", "convert",
             "inference.commands", "matplotlib.figure", "matplotlib.backends.backend_agg"]  # fmt: skip
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(PRELOADED)


def run_in_processes(function, world_size, *args):
    """Call function(rank, world_size, *args) in each process of a gloo group; return the results in order of rank."""
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
    sys.stdout.flush()
    os._exit(0)  # destroying a group of gloo can wait for its threads, and they for Python's lock, for ever


def start(function, *args):
    """Call a function in a process of its own; returns the process."""
    process = COPIES.Process(target=function, args=args)
    process.start()
    return process


def run_script(words, processes, folder, environment, fresh=False):
    """Do here what `python *words` would, or torchrun with so many processes; writes `stdout` and `stderr`.

    With `fresh` the words are a whole command line, and this process becomes it.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if fresh:
        os.execv(words[0], words)
    if processes == 1:
        run_main(words)
    else:
        options = [f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
        run_agent(options, {}, run_main, words)


def run_main(words):
    """Run a script with its arguments, as python does; one of several processes has collectives that refuse."""
    if "LOCAL_RANK" in os.environ:
        runpy.run_path(str(Path(__file__).parent / "nccl_like" / "sitecustomize.py"))
    sys.argv = list(map(str, words))
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_agent(options, environment, function, *args):
    """Do here what torchrun with these options would, but that its processes are copies, which call a function."""
    os.environ.update(environment)
    config, _, _ = config_from_args(parse_args([*options, "--start_method=fork", "no script"]))
    elastic_launch(config, function)(*args)

"""How the processes of a run find each other, also after torchrun has started some or all of them again."""

import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from utils import UserError, all_gather_object

WAIT_SECONDS = 0.02  # between two looks into the store


def join_group(backend: str, timeout: timedelta) -> None:
    """Join the process group that the environment describes.

    torchrun's agents keep one store for all starts of the workers, with the keys of earlier starts in it, and an agent
    that is new to a run counts its starts from 0. So nothing in the environment is alike in the workers of a start and
    in no other; they agree on a name themselves, and the group lives under that.

    Args:
        backend: "nccl" or "gloo".
        timeout: of joining, and of each collective.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 makes a store for this start
        dist.init_process_group(backend, timeout=timeout)
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, world_size, is_master=False, timeout=timeout)
    own = dist.PrefixStore(agree(store, rank, world_size, timeout), store)
    dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=world_size)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that rank 0 makes up, the same on all ranks, whatever earlier starts have left in the store.

    Raises:
        UserError: a process does not come.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    found = _offer(store, world_size, deadline) if rank == 0 else _ask(store, rank, deadline)
    if not found:
        raise UserError(f"rank {rank} of {world_size} waited {timeout} for the other processes; look at their output")
    return found


def _offer(store: dist.Store, world_size: int, deadline: float) -> str:
    """Answer whoever asks, until every rank has taken the name."""
    name, missing = f"start-{uuid.uuid4().hex}", list(range(1, world_size))
    while missing and time.monotonic() < deadline:
        for rank in missing:
            if store.check([f"asks/{rank}"]):  # perhaps a process of an earlier start, which nobody will read for
                store.set(f"answer/{rank}", f"{store.get(f'asks/{rank}').decode()} {name}")
        missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
        time.sleep(WAIT_SECONDS)
    return "" if missing else name


def _ask(store: dist.Store, rank: int, deadline: float) -> str:
    """Ask for the name, by a mark that no other process has, until the answer is for that mark."""
    mark = uuid.uuid4().hex
    store.set(f"asks/{rank}", mark)
    while time.monotonic() < deadline:
        if store.check([f"answer/{rank}"]):
            asker, _, name = store.get(f"answer/{rank}").decode().partition(" ")
            if asker == mark:
                store.set(f"{name}/{rank}", "")
                return name
        time.sleep(WAIT_SECONDS)
    return ""


def was_restarted() -> bool:
    """Tell, alike on all ranks, whether torchrun has started any of the processes before."""
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return any(all_gather_object(started_before() or counted))


def started_before() -> bool:
    """Tell whether this process's agent has started it before, and note that it has now.

    An agent does not count a start whose reason is that another machine came; but all its starts have one log folder,
    which is its own: the file for errors is <log folder>/attempt_<count>/<local rank>/error.json.
    """
    rank_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull)).parent
    if not rank_folder.parent.name.startswith("attempt_"):
        return False
    mark = rank_folder.parent.parent / f"started_{rank_folder.name}"
    before = mark.exists()
    with suppress(OSError):
        mark.touch()
    return before

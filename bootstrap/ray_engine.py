"""CapFilt on Ray: workers on any number of machines take shards, come and go; the driver alone writes what is done.

A worker that is lost gives its shard back. A driver that is lost continues at the next start from the shards' files.
"""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bootstrap.shards import Row, Shards
from bootstrap.stages import make_work
from bootstrap.tars import Output
from utils import UserError, get_world_size, note_once, say

POLL_SECONDS = 1.0  # after which lost and new machines are noticed
MOST_LOSSES = 20  # of workers by one shard, or in a row while they start, for each that is wanted


class Given:
    """The part of `Shards` that a worker needs, of the one shard that it was given."""

    def __init__(self, tars: bool):
        self.tars, self.given = tars, list[Any]()

    def pairs(self, shard: int) -> list[Any]:
        """Return the pairs of the shard."""
        return self.given

    rows = pairs


class Worker:
    """An actor with the model of a stage; it starts in the driver's working folder, for relative paths."""

    def __init__(self, folder: Path, tars: bool, before: Sequence[str], settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.shards, self.before = Given(tars), {name: Given(tars) for name in before}
        self.work: Callable[[int], list[Row]] | None = None

    def start(self) -> None:
        """Load the model."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            where = os.uname().nodename
            raise UserError(f"{self.folder} is not on {where} ({error.strerror}); share it between machines") from None
        none = {"captions": None, "duplicates": None}
        self.work = make_work(shards=self.shards, **(none | self.before), **self.settings)

    def do(self, shard: int, pairs: list[Any], before: dict[str, list[Row]]) -> list[Row]:
        """Return the rows of a shard."""
        self.shards.given = pairs
        for name, rows in before.items():
            self.before[name].given = rows
        return self.work(shard)


def ray_results(
    stage: str, config: Any, seed: int, shards: Shards, captions: Shards | None, duplicates: Shards | None,
    output: Output,
) -> Iterator[tuple[int, list[Row]]]:  # fmt: skip
    """Yield number and rows of each unfinished shard, in the order in which workers finish them.

    Raises:
        UserError: Ray is not installed or not reached, a worker cannot do its work, or a shard ends all its workers.
    """
    ray = start_ray(config)
    device = "" if config.gpus_per_worker else "cpu"
    settings = dict(stage=stage, config=config, seed=seed, device=device, output=output)
    before = {name: of for name, of in (("captions", captions), ("duplicates", duplicates)) if of}
    actor = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker)(Worker)
    waiting = deque(shard for shard in range(len(shards)) if not shards.path(shard).is_file())
    running: dict[Any, tuple[Any, int | None]] = {}  # result -> worker, and its shard or None while it starts
    idle, finished, losses = [], list[tuple[int, list[Row]]](), Counter[int | None]()
    while waiting or any(shard is not None for _, shard in running.values()):
        wanted = min(config.workers or room(ray, config), len(waiting) + len(running))
        for _ in range(wanted - len(running) - len(idle)):
            worker = actor.remote(Path.cwd(), shards.tars, [*before], settings)
            running[worker.start.remote()] = worker, None
        while idle and waiting:
            worker, shard = idle.pop(), waiting.popleft()
            rows = {name: of.rows(shard) for name, of in before.items()}
            running[worker.do.remote(shard, shards.pairs(shard), rows)] = worker, shard
        yield from finished  # written while the workers go on
        finished = []
        for result in ray.wait([*running], timeout=POLL_SECONDS)[0]:
            worker, shard = running.pop(result)
            try:
                rows = ray.get(result)
            except ray.exceptions.RayTaskError:  # raised by the work
                raise
            except ray.exceptions.RayError as error:  # the worker, its machine, or the result is lost
                _give_back(shard, waiting, losses, type(error).__name__, wanted)
                continue
            idle.append(worker)
            losses[None] = 0
            if shard is not None:
                finished.append((shard, rows))
    yield from finished


def _give_back(
    shard: int | None, waiting: deque[int], losses: Counter[int | None], reason: str, wanted: int
) -> None:
    """Put the shard of a lost worker, None while it starts, before the others; UserError after too many losses."""
    say(f"note: a worker was lost ({reason}); another takes its place")
    losses[shard] += 1
    if shard is None:
        if losses[None] > MOST_LOSSES * wanted:
            raise UserError(f"{losses[None]} workers in a row were lost while they started; see Ray's logs and memory")
        return
    waiting.appendleft(shard)
    if losses[shard] > MOST_LOSSES:
        raise UserError(f"shard {shard} has ended {MOST_LOSSES} workers; see Ray's logs, and look at its images")


def start_ray(config: Any) -> Any:
    """Return the package, connected to the cluster at `ray_address`, or to one that is started here."""
    if get_world_size() > 1:
        raise UserError("engine: ray starts its workers itself; start capfilt.py with python, not with torchrun")
    try:
        import ray
    except ImportError:
        raise UserError("engine: ray needs Ray; pip install ray") from None
    if ray.is_initialized():  # by an earlier stage
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.ray_address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    how = {"address": address} if address else {"include_dashboard": False}
    try:
        if host and "/" not in host:  # Ray itself waits for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**how, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"no Ray cluster at ray_address {address!r} ({text:.200}); correct it") from None
    return ray


def room(ray: Any, config: Any) -> int:
    """Return the number of workers that the cluster's machines have room for now, at least 1."""
    there = ray.cluster_resources()
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    found = min(int(there.get(kind, 0) // number) for kind, number in needs.items() if number)
    if not found:
        note_once(f"waiting for machines with room for a worker ({needs})")  # which Ray may now start
    return max(found, 1)

"""The campaign of kills: every training script and capfilt.py, killed at random moments, has to end as if untouched.

    python -m tests.faults --kills 50          # about half an hour on two cores; goes on where it was stopped
    python -m tests.faults --kills 6 --output output/faults_short --page ''

Every run has two processes under torchrun. A kill is drawn by a seed: SIGKILL or SIGTERM, of one rank or of all, in a
step, in evaluation, or while a checkpoint is written. The run then goes on, by hand with --resume or by torchrun's own
restarts, and what it leaves is compared with an untouched run: weights, optimizer, random numbers, logs, results.

To save half a minute of imports a run, torchrun's agent is started through its Python interface and forks its workers
from this process; every tenth run is started by the command line.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from scripts import TINY, command, environment, lines, settings  # noqa: E402

from miniature.writing import write_miniature  # noqa: E402

CONFIGS = "configs/miniature"
STEPS = 4  # of an epoch
EPOCHS = 2
LIMIT = 150  # seconds that anything may take
COMMAND_LINE = 10  # every so many runs are started by the command line
MOMENTS = ("in a step", "in evaluation", "in a checkpoint")
WHOM = ("rank 0", "rank 1", "all")
HOW = ("by hand", "by torchrun")
SCRIPTS = ("train_caption.py", "train_retrieval.py", "train_vqa.py", "train_nlvr.py", "pretrain.py", "capfilt.py")


@dataclass
class Kill:
    """One kill: what was planned, what was met, and what was lost.

    Attributes:
        number: from 1.
        script, signal, whom, moment, how: what was planned.
        start: how the run was started.
        met: where the run was when the signal was sent, by its files.
        seconds: from the start to the end of the continued run.
        lost: what differs from the untouched run.
    """

    number: int
    script: str
    signal: str
    whom: str
    moment: str
    how: str
    start: str = "forked"
    met: str = ""
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)


def plan(kills: int, seed: int, scripts: Sequence[str] = SCRIPTS, hows: Sequence[str] = HOW) -> list[Kill]:
    """Draw the kills: scripts in turn, all combinations of the rest in random order."""
    combinations: list[tuple[str, ...]] = []
    rng, found = random.Random(f"faults/{seed}"), []
    for number in range(1, kills + 1):
        if not combinations:
            combinations = list(itertools.product(("SIGKILL", "SIGTERM"), WHOM, MOMENTS, hows))
            rng.shuffle(combinations)
        name, whom, moment, how = combinations.pop()
        start = "command line" if number % COMMAND_LINE == 0 else "forked"
        found.append(Kill(number, scripts[(number - 1) % len(scripts)], name, whom, moment, how, start))
    return found


# The runs.


def arguments(script: str, world: Path, folder: Path) -> list[str]:
    """Return the arguments of a script's run: two epochs of four steps, a checkpoint every second step."""
    roots: dict[str, Any] = dict(image_root=world, ann_root=world / "annotations")
    task = script.removeprefix("train_").removesuffix(".py")
    train = dict(max_epoch=EPOCHS, eval_every=1, log_every=1, save_every=2)
    if task == "capfilt":
        model = ROOT / CONFIGS / "model.safetensors"
        web = dict(pairs=f"[{world / 'annotations/pretrain_web.json'}]", image_root=world)
        values = dict(captioner=model, filter=model, shard_size=5, batch_size=5) | web
        return ["--config", f"{CONFIGS}/capfilt.yaml", "--output_dir", str(folder), *settings(**values)]
    if task == "vqa":
        roots = dict(vqa_root=world, vg_root=world, ann_root=world / "annotations", train_files="[vqa_train]")
    if task == "pretrain":
        roots = dict(image_root=world, train_file=f"[{world / 'annotations/pretrain_human.json'}]")
    if task == "caption":
        train |= dict(coco_gt_root=world / "annotations", java="false", max_length=12)
    if task in ("retrieval", "pretrain"):
        train |= dict(queue_size=40, embed_dim=16)
    if task == "retrieval":
        train |= dict(k_test=3)
    size = "batch_size" if task in ("caption", "pretrain") else "batch_size_train"
    per_step = {"caption": 40, "retrieval": 40, "pretrain": 40, "vqa": 0, "nlvr": 0}[task]
    per_step = per_step or len(json.loads((world / f"annotations/{task}_train.json").read_text()))
    train[size] = per_step // (2 * STEPS)
    tiny = [part for value in TINY for part in ("--set", value)]
    path = ["--config", f"{CONFIGS}/{task}.yaml", "--output_dir", str(folder)]
    return [*path, *tiny, *settings(**roots, pretrained="''", **train)]


def worker(script: str, args: list[str]) -> None:
    """Run a script in a forked worker of the agent, as its command line would."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [script, *args]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.stdout.flush()
            os._exit(end.code)


def agent(script: str, args: list[str], restarts: int, log: Path) -> None:
    """Be torchrun's agent, in a session of its own, for two forked workers."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=str(os.getpid()), max_restarts=restarts,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    elastic_launch(config, worker)(script, args)


class Job:
    """A started run under torchrun."""

    def __init__(self, script: str, args: list[str], restarts: int, log: Path, by_command_line: bool):
        if by_command_line:
            line = command(script, *args, processes=2)
            line.insert(line.index("--standalone"), f"--max_restarts={restarts}")
            with open(log, "ab") as file:
                self.process = subprocess.Popen(
                    line, cwd=ROOT, env=environment(), start_new_session=True, stdout=file, stderr=file
                )
        else:
            self.process = multiprocessing.get_context("fork").Process(target=agent, args=(script, args, restarts, log))
            self.process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.code() is None:
            self.kill()

    @property
    def pid(self) -> int:
        """Process number of the agent."""
        return self.process.pid

    def code(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self) -> int:
        """Return the exit code at the end; a run that does not end is killed.

        Raises:
            TimeoutError: it did not end.
        """
        end = time.monotonic() + LIMIT
        while self.code() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"the run did not end within {LIMIT} s")
            time.sleep(0.02)
        return self.code()

    def kill(self) -> None:
        """Kill the agent and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def workers(self) -> list[int]:
        """Return the workers' process numbers, in order of rank."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="utf-8")
            return sorted(map(int, children.split()))
        except FileNotFoundError:
            return []

    def signal(self, number: int, whom: str, with_agent: bool) -> None:
        """Send a signal to a rank, or to all with the agent if the run goes on by hand."""
        with suppress(ProcessLookupError):
            if whom == "all" and with_agent:
                os.killpg(self.pid, number)
                return
        for rank, pid in enumerate(self.workers()):
            if whom in ("all", f"rank {rank}"):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


# The moments.


def wait_until(job: Job, condition: Callable[[], bool]) -> bool:
    """Wait for a moment; returns whether it came before the run's end."""
    end = time.monotonic() + LIMIT
    while job.code() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0003)
    return False


def part_files(folder: Path) -> list[str]:
    """Return the checkpoints, or CapFilt's shards, that are being written."""
    found = [folder / "checkpoint_last.pth.part", folder / "checkpoint_best.pth.part"]
    found += [path for part in ("captions", "texts") for path in (folder / "shards" / part).glob("*.part*")]
    return [path.name for path in found if path.exists()]


def progress(folder: Path) -> int:
    """Return how many steps, or shards of CapFilt, are done."""
    if (folder / "shards").is_dir():
        return len(list((folder / "shards").glob("*/*.jsonl")))
    return lines(folder / "curve.jsonl")


def moment(kill: Kill, folder: Path, rng: random.Random) -> tuple[Callable[[], bool], float]:
    """Return what to wait for, and how many seconds more."""
    shards = kill.script == "capfilt.py"
    total = 12 if shards else STEPS * EPOCHS  # of captions, then of texts
    if kill.moment == "in a checkpoint":
        first = rng.randrange(0, total - 1)
        return lambda: progress(folder) >= first and bool(part_files(folder)), 0.0
    if kill.moment == "in evaluation" and not shards and kill.script != "pretrain.py":
        epoch, saved = rng.randrange(EPOCHS), folder / "checkpoint_last.pth"
        steps = STEPS * (epoch + 1)

        def evaluates() -> bool:
            """All steps of the epoch are done, and the checkpoint that precedes evaluation is written."""
            if progress(folder) < steps or lines(folder / "log.txt") > epoch or not saved.exists():
                return False
            return saved.stat().st_mtime_ns > (folder / "curve.jsonl").stat().st_mtime_ns and not part_files(folder)

        return evaluates, rng.uniform(0, 0.2)
    first = rng.randrange(total // 2, total - 1) if kill.moment == "in evaluation" else rng.randrange(0, total - 1)
    return lambda: progress(folder) >= first, rng.uniform(0, 0.1)


def describe(folder: Path) -> str:
    """Tell where a run is by its files."""
    done, parts = progress(folder), part_files(folder)
    if (folder / "shards").is_dir():
        told = f"{done} shards done"
    else:
        epochs = lines(folder / "log.txt")
        between = done and done % STEPS == 0 and epochs < done // STEPS
        told = f"step {done}" + (f", evaluating epoch {done // STEPS}" if between and not parts else "")
    return told + (f", {parts[0].split('.part')[0]} half written" if parts else "")


# What is compared.

COMPARED = (".pth", ".txt", ".jsonl", ".json", ".yaml")


def differences(folder: Path, whole: Path) -> list[str]:
    """Return what of a run is not equal, bit for bit, to the untouched one's."""
    found = []
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if path.suffix in COMPARED and not name.match("shards/*/settings.json"):
            if not (folder / name).is_file():
                found.append(f"{name} is missing")
            elif not same_file(folder / name, path):
                found.append(f"{name} differs")
    left = [str(path.relative_to(folder)) for path in folder.rglob("*.part*")]
    return found + [f"{name} was left behind" for name in left]


def same_file(one: Path, other: Path) -> bool:
    """Compare two files: checkpoints by all they hold, others as they are."""
    if one.suffix == ".pth":
        return same(*(torch.load(path, map_location="cpu", weights_only=True) for path in (one, other)))
    return one.read_bytes() == other.read_bytes()


def same(one: Any, other: Any) -> bool:
    """Compare nested containers of tensors and plain values, exactly."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# The campaign.


def untouched(script: str, output: Path) -> Path:
    """Return the folder of a script's untouched run, which is made if absent."""
    folder = output / "whole" / script.removesuffix(".py")
    if not (folder / "report.html").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        args, log = arguments(script, output / "world", folder), output / f"whole_{script}.log"
        with Job(script, args, 0, log, False) as job:
            code = job.wait()
        if code:
            raise SystemExit(f"the untouched run of {script} failed:\n{log.read_text()[-3000:]}")
    return folder


def carry_out(kill: Kill, output: Path, seed: int) -> None:
    """Start a run, kill it, let it go on, and note what was lost; a run that misses its moment is done again."""
    whole, folder = untouched(kill.script, output), output / f"kill{kill.number}"
    log = folder.with_suffix(".log")
    rng, began = random.Random(f"moment/{seed}/{kill.number}"), time.monotonic()
    try:
        while not (killed := start_and_kill(kill, output, folder, log, rng)):
            pass
        code = go_on(kill, killed, output, folder, log)
        kill.lost = differences(folder, whole) if code == 0 else [f"the continued run ended with {code}"]
    except TimeoutError as error:
        kill.lost = [str(error)]
    kill.seconds = round(time.monotonic() - began, 1)
    if not kill.lost:
        shutil.rmtree(folder)


def start_and_kill(kill: Kill, output: Path, folder: Path, log: Path, rng: random.Random) -> Job | None:
    """Start a run and kill it at a moment; None if it ended before."""
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    by_hand = kill.how == "by hand"
    args = arguments(kill.script, output / "world", folder)
    with Job(kill.script, args, 0 if by_hand else 2, log, kill.start == "command line") as job:
        condition, delay = moment(kill, folder, rng)
        came = wait_until(job, condition)
        time.sleep(delay)
        before, came = describe(folder), came and job.code() is None
        job.signal(getattr(signal, kill.signal), kill.whom, with_agent=by_hand)
        dead = kill.signal == "SIGKILL" and kill.whom != "rank 1"  # rank 0, which writes, is where it was
        kill.met = describe(folder) if dead else before
        job.wait()
    return job if came else None


def go_on(kill: Kill, killed: Job, output: Path, folder: Path, log: Path) -> int:
    """Start a killed run again, unless torchrun has; returns the exit code of its end."""
    if kill.how == "by torchrun":
        return killed.wait()
    resume = (folder / "checkpoint_last.pth").is_file()
    kill.met += "" if resume or kill.script == "capfilt.py" else ", nothing saved yet"
    args = arguments(kill.script, output / "world", folder) + ["--resume"] * resume
    with Job(kill.script, args, 0, log, kill.start == "command line") as job:
        return job.wait()


def campaign(kills: list[Kill], seed: int, output: Path) -> list[Kill]:
    """Carry out the kills that are not in kills.jsonl yet, and return all."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "world" / "annotations" / "pretrain_web.json").is_file():
        write_miniature(output / "world", 1, num_train=8, num_val=4, num_test=6, num_web=30)
    preload()
    book = output / "kills.jsonl"
    done = [Kill(**json.loads(line)) for line in book.read_text().splitlines()] if book.is_file() else []
    for kill in kills[len(done) :]:
        carry_out(kill, output, seed)
        done.append(kill)
        with open(book, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
        print(kill.number, *[getattr(kill, name) for name in COLUMNS[1:]], kill.lost or "nothing lost", flush=True)
    return done


def preload() -> None:
    """Import, once for all forked workers, what the scripts import; nothing here may start threads."""
    for script in SCRIPTS:
        runpy.run_path(str(ROOT / script), run_name="preload")
    import matplotlib.figure  # noqa: F401
    import torch.distributed.elastic.agent.server.local_elastic_agent  # noqa: F401
    import torch.nn.parallel.distributed  # noqa: F401

    torch.set_num_threads(1)


COLUMNS = ("number", "script", "signal", "whom", "moment", "met", "how", "start", "seconds")
TITLES = ("", "script", "signal", "whom", "moment", "met", "went on", "started", "seconds")


def write_page(done: list[Kill], path: Path) -> None:
    """Write the table."""
    lost = [kill for kill in done if kill.lost]
    total = "nothing" if not lost else f"something in {len(lost)}"
    head = f"""# {len(done)} kills

`python -m tests.faults --kills {len(done)}` kills runs of the training scripts and of CapFilt, on two processes under
torchrun, at random moments, lets them go on, and compares what they leave with an untouched run, bit for bit: weights,
optimizer, random numbers, `log.txt`, `curve.jsonl`, the result files and the bootstrapped set. Lost: **{total}**.

"moment" is what was aimed at, "met" what the run's files showed when the signal had been sent. "by hand" is the same
command again with `--resume`, where there is a checkpoint; "by torchrun" is `--max_restarts`. "all" by hand includes
torchrun itself. "forked" runs are torchrun's own agent started through its Python interface, its workers forked
from a process that has imported PyTorch already.

| {" | ".join(TITLES)} | lost |
|{"---|" * (len(TITLES) + 1)}
"""
    rows = []
    for kill in done:
        cells = [str(getattr(kill, name)) for name in COLUMNS] + ["; ".join(kill.lost) or "nothing"]
        rows.append(f"| {' | '.join(cells)} |")
    path.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> int:
    """Carry out the campaign and write its page; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "faults", help="folder of the runs")
    parser.add_argument("--page", default=str(ROOT / "docs" / "faults.md"), help="table to write; '' for none")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="default: all")
    parser.add_argument("--how", nargs="+", choices=HOW, default=HOW, help="how runs go on (default: both)")
    args = parser.parse_args()
    done = campaign(plan(args.kills, args.seed, args.scripts, args.how), args.seed, args.output)
    if args.page:
        write_page(done, Path(args.page))
    return int(any(kill.lost for kill in done))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())

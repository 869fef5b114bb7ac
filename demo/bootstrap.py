"""CapFilt on the miniature world, as the paper's tables 1 and 2 (sections 4.2 and 4.3).

    python -m demo.bootstrap --output output/bootstrap

For each seed: pretrain on human and web pairs, fine-tune a captioner and a filter on the human pairs, bootstrap the web
pairs, and pretrain for as long on each set of pairs. A stopped run continues with the same command.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from demo.bootstrap_table import SETS, write_tables
from files import read_json, read_rows, write_json
from launch.config import PretrainConfig
from launch.settings_file import load_config
from models.blip_pretrain import blip_pretrain
from models.pretrained import load_pretrained
from utils import UserError, run_command

CONFIGS = "configs/miniature"
DECODING = {  # settings of capfilt.py
    "nucleus": {"sample": "true"},
    "beam": {"sample": "false"},
    "best": {"sample": "true", "best_of": 4},
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment."""

    seeds: int = 3  # repetitions, on one world
    level: int = 2  # of the world
    train: int = 600  # images with five human captions each
    web: int = 3000  # images with one web text each; 45% of the texts do not match
    test: int = 300  # images that every model captions and ranks
    rows: int = 8000  # pairs of an epoch of pretraining, for any set: drawn or repeated at random
    passes: int = 3  # epochs of pretraining
    tuning: int = 6  # epochs of fine-tuning on the human pairs
    warmup: int = 50  # steps of warm-up


QUICK = Plan(seeds=1, level=1, train=16, web=24, test=8, rows=32, passes=1, tuning=1, warmup=1)


@dataclass
class Stage:
    """One stage of the experiment: a function, then a command; either may be absent."""

    name: str  # also the path of the stage's folder below the root
    needs: tuple[str, ...] = ()  # names of the stages that must be done before
    before: Callable[[], None] | None = None
    command: list[str] = field(default_factory=list)  # arguments of Python


# The stages.


def all_stages(root: Path, plan: Plan) -> list[Stage]:
    """Return every stage, in an order in which they could run one by one."""
    counts = {"train": plan.train, "val": 8, "test": plan.test, "web": plan.web, "level": plan.level, "seed": 1}
    options = [f"--{name}={count}" for name, count in counts.items()]
    world = Stage("world", command=["-m", "miniature", "--output", str(root / "world"), *options])
    return [world, *(stage for seed in range(plan.seeds) for stage in seed_stages(root, plan, seed))]


def seed_stages(root: Path, plan: Plan, seed: int) -> Iterator[Stage]:
    """Yield the stages of one seed: the tools, the bootstrapped pairs, and the models to compare."""
    here = f"seed{seed}"
    start = root / here / "start.pth"
    yield Stage(f"{here}/start", ("world",), lambda: start_weights(start, seed))
    yield from model_stages(root, plan, seed, "none", f"{here}/start")
    yield from tool_stages(root, plan, seed)
    tools = {name: root / here / "tools" / name / "checkpoint_best.pth" for name in ("captioner", "filter")}
    tools |= {"pairs": [annotation(root, "pretrain_web.json")], "image_root": root / "world"}
    for decoding, settings in DECODING.items():
        needs = (f"{here}/tools/captioner", f"{here}/tools/filter")
        yield script_stage(root, f"{here}/capfilt_{decoding}", needs, "capfilt.py", "capfilt", settings | tools, seed)
    for name, pairs in SETS.items():
        if name != "none":
            yield from model_stages(root, plan, seed, name, f"{here}/capfilt_{pairs.decoding}")


def tool_stages(root: Path, plan: Plan, seed: int) -> Iterator[Stage]:
    """Yield the fine-tuning of captioner and filter on the human captions; only validation images are evaluated."""
    here = f"seed{seed}"
    settings = {
        "image_root": root / "world",
        "ann_root": annotation(root),
        "train_file": annotation(root, "coco_karpathy_train.json"),
        "pretrained": root / here / "none" / "checkpoint_best.pth",
        "init_lr": "3e-4",
        "max_epoch": plan.tuning,
        "eval_every": plan.tuning,
        "warmup": plan.warmup,
    }
    test = {"test_file": annotation(root, "coco_karpathy_val.json"), "coco_gt_root": annotation(root), "java": "false"}
    more = settings | test | {"test_gt": annotation(root, "coco_karpathy_val_gt.json")}
    name, needs = f"{here}/tools/captioner", (f"{here}/none",)
    yield script_stage(root, name, needs, "train_caption.py", "caption_finetune", more, seed)
    more = settings | {"test_file": annotation(root, "flickr30k_val.json")}
    yield script_stage(root, f"{here}/tools/filter", needs, "train_retrieval.py", "retrieval", more, seed)


def model_stages(root: Path, plan: Plan, seed: int, name: str, needed: str) -> Iterator[Stage]:
    """Yield the pretraining on one set of pairs, and the evaluations of the model without fine-tuning."""
    here = f"seed{seed}/{name}"
    pairs = root / here / "pairs.jsonl"
    settings = {
        "image_root": root / "world",
        "train_file": [pairs],
        "pretrained": root / f"seed{seed}" / "start.pth",
        "batch_size": 32,
        "max_epoch": plan.passes,
        "warmup_steps": plan.warmup,
    }
    stage = script_stage(root, here, (needed,), "pretrain.py", "pretrain", settings, seed)
    stage.before = lambda: write_pairs(pairs, choose_pairs(root, seed, name), plan.rows, seed)
    yield stage
    folders = {"image_root": root / "world", "ann_root": annotation(root)}
    captioning = {"prompt": "", "java": "false", "coco_gt_root": annotation(root)}
    for kind, script, config, more in (
        ("caption", "train_caption.py", "caption_finetune", captioning),
        ("retrieval", "train_retrieval.py", "retrieval", {"k_test": 32}),
    ):
        settings = folders | more | {"pretrained": root / here / "checkpoint_best.pth"}
        stage = script_stage(root, f"{here}/{kind}", (here,), script, config, settings, seed)
        stage.command.append("--evaluate")
        yield stage


def script_stage(
    root: Path, name: str, needs: tuple[str, ...], script: str, config: str, settings: dict, seed: int
) -> Stage:
    """Return a stage that runs one of the scripts."""
    command = [script, "--config", f"{CONFIGS}/{config}.yaml", "--output_dir", str(root / name), "--seed", str(seed)]
    for key, value in settings.items():
        text = json.dumps([str(item) for item in value]) if isinstance(value, list) else str(value)
        command += ["--set", f"{key}={text}"]
    return Stage(name, needs, command=command)


# Files of the stages.


def annotation(root: Path, name: str = "") -> Path:
    """Return the path of one of the world's annotation files, or of their folder."""
    return root / "world" / "annotations" / name


def start_weights(path: Path, seed: int) -> None:
    """Write the initial weights of every pretraining of a seed.

    The image encoder starts from the miniature model's, which was trained on other images, as the paper's starts from
    ImageNet's. The text transformer starts from random weights; the paper's starts from BERT's.
    """
    torch.manual_seed(seed)
    config = load_config(PretrainConfig, f"{CONFIGS}/pretrain.yaml")
    settings = config.model_settings() | {"embed_dim": config.embed_dim, "queue_size": config.queue_size}
    model = blip_pretrain(**settings)
    known = load_pretrained(blip_pretrain(**settings), f"{CONFIGS}/model.safetensors", "pretrain")
    for name in ("visual_encoder", "visual_encoder_m"):
        getattr(model, name).load_state_dict(known.visual_encoder.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, path)


def choose_pairs(root: Path, seed: int, name: str) -> list[dict]:
    """Return the pairs of one set: the human pairs, and the web and synthetic texts that the set takes."""
    human = read_json(annotation(root, "pretrain_human.json"))
    if name == "none":
        return human + read_json(annotation(root, "pretrain_web.json"))
    wanted, found = SETS[name], []
    for file in ("bootstrapped", "dropped"):
        rows = read_rows(root / f"seed{seed}" / f"capfilt_{wanted.decoding}" / f"{file}.jsonl")
        found += [row for row in rows if wanted.takes(row["source"], file == "bootstrapped")]
    return human + [{"image": row["image"], "caption": row["caption"]} for row in found]


def write_pairs(path: Path, pairs: list[dict], count: int, seed: int) -> None:
    """Write `count` pairs: all of them in random order, repeated as often as needed."""
    rng = random.Random(f"pairs/{seed}")
    rounds = (rng.sample(pairs, len(pairs)) for _ in itertools.count())
    rows = itertools.islice(itertools.chain.from_iterable(rounds), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Running the stages.


def done_file(root: Path, stage: Stage) -> Path:
    """Return the file that marks a stage as done; it holds the seconds that the stage took."""
    return root / "done" / f"{stage.name.replace('/', '.')}.json"


async def run_stages(root: Path, stages: Sequence[Stage], jobs: int) -> None:
    """Run the stages that are not done yet, at most `jobs` at a time, each when the stages that it needs are done.

    Raises:
        UserError: a stage failed; the others that were running are ended.
    """
    slots, began = asyncio.Semaphore(jobs), time.monotonic()
    tasks: dict[str, asyncio.Task] = {}

    async def run(stage: Stage) -> None:
        """Run a stage after those it needs, unless it is done."""
        await asyncio.gather(*(tasks[name] for name in stage.needs))
        if done_file(root, stage).is_file():
            return
        async with slots:
            seconds = await run_stage(root, stage)
        done = sum(done_file(root, other).is_file() for other in stages)
        minutes = (time.monotonic() - began) / 60
        print(f"{done}/{len(stages)}  {stage.name}  {seconds:.0f} s  ({minutes:.1f} minutes in all)", flush=True)

    tasks.update((stage.name, asyncio.create_task(run(stage))) for stage in stages)
    await asyncio.gather(*tasks.values())  # after an error, asyncio.run cancels the other tasks


async def run_stage(root: Path, stage: Stage) -> float:
    """Run a stage to its end, continuing where a killed one stopped, and mark it as done; return the seconds.

    Raises:
        UserError: its command failed.
    """
    began = time.monotonic()
    if stage.before:
        stage.before()
    if stage.command:
        resume = ["--resume"] if (root / stage.name / "checkpoint_last.pth").is_file() else []
        await run_python([*stage.command, *resume], stage.name, root / "logs" / f"{done_file(root, stage).stem}.log")
    seconds = time.monotonic() - began
    write_json(done_file(root, stage), {"seconds": seconds})
    return seconds


async def run_python(arguments: list[str], name: str, log: Path) -> None:
    """Run Python on one core; its output goes to a log. The process ends when this task is cancelled."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = await child.wait()
        finally:
            if child.returncode is None:
                child.terminate()
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"stage {name} ended with {code}: {last}; see {log}, and start again to continue")


def keep_plan(root: Path, plan: Plan) -> None:
    """Write the plan to the folder; one with more seeds continues it.

    Raises:
        UserError: the folder holds stages of another plan.
    """
    path = root / "plan.json"
    if path.is_file() and read_json(path) | {"seeds": plan.seeds} != vars(plan):
        raise UserError(f"{root} holds stages of another plan ({path}); choose another --output, or delete it")
    write_json(path, vars(plan))


def main() -> None:
    """Run the stages that are not done, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/bootstrap", help="folder of everything (default: output/bootstrap)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="stages at once (default: all cores)")
    parser.add_argument("--seeds", type=int, help="repetitions (default: 3); more of them continue a finished run")
    parser.add_argument("--quick", action="store_true", help="a few pairs and one seed, as a test")
    args = parser.parse_args()
    root, plan = Path(args.output), QUICK if args.quick else Plan()
    plan = replace(plan, seeds=args.seeds or plan.seeds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_plan(root, plan)
    asyncio.run(run_stages(root, all_stages(root, plan), max(args.jobs, 1)))
    print(write_tables(root, plan.seeds))


if __name__ == "__main__":
    sys.exit(run_command(main))

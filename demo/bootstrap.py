"""CapFilt on the miniature world, as the paper's tables 1 and 2 (sections 4.2 and 4.3).

    python -m demo.bootstrap --output output/bootstrap

For each seed: pretrain on human and web pairs, fine-tune a captioner and a filter on the human pairs, bootstrap the web
pairs, and pretrain for as long on each set of pairs. A stopped run continues with the same command.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from demo.bootstrap_table import SETS, write_tables
from files import read_json, write_json
from launch.config import PretrainConfig, load_config
from models.blip_pretrain import blip_pretrain
from models.pretrained import load_pretrained
from utils import UserError

CONFIGS = "configs/miniature"
DECODING = {"nucleus": "true", "beam": "false"}  # capfilt.py's `sample`


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment.

    Args:
        seeds: number of repetitions, on one world.
        level: level of the world.
        train: images with five human captions each.
        web: images with one web text each; 45% of the texts do not match.
        test: images that every model captions and ranks.
        rows: pairs of an epoch of pretraining, for any set: drawn or repeated at random.
        passes: epochs of pretraining.
        tuning: epochs of fine-tuning on the human pairs.
        warmup: steps of warm-up.
    """

    seeds: int = 3
    level: int = 2
    train: int = 600
    web: int = 3000
    test: int = 300
    rows: int = 8000
    passes: int = 3
    tuning: int = 6
    warmup: int = 50


QUICK = Plan(seeds=1, level=1, train=16, web=24, test=8, rows=32, passes=1, tuning=1, warmup=1)


@dataclass
class Stage:
    """One stage of the experiment: a function, then a command; either may be absent.

    Args:
        name: name, and path of the stage's folder below the root.
        needs: names of the stages that must be done before.
        before: function called first.
        command: arguments of Python.
    """

    name: str
    needs: tuple[str, ...] = ()
    before: Callable[[], None] | None = None
    command: list[str] = field(default_factory=list)


# The stages.


def all_stages(root: Path, plan: Plan) -> list[Stage]:
    """Return every stage after those it needs; stages of different seeds, which can run at once, take turns."""
    counts = {"train": plan.train, "val": 8, "test": plan.test, "web": plan.web, "level": plan.level, "seed": 1}
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    world = Stage("world", command=["-m", "miniature", "--output", str(root / "world"), *options])
    turns = zip(*(seed_stages(root, plan, seed) for seed in range(plan.seeds)), strict=True)
    return [world, *itertools.chain.from_iterable(turns)]


def seed_stages(root: Path, plan: Plan, seed: int) -> Iterator[Stage]:
    """Yield the stages of one seed: the tools, the bootstrapped pairs, and the models to compare."""
    here = f"seed{seed}"
    start = root / here / "start.pth"
    yield Stage(f"{here}/start", ("world",), lambda: start_weights(start, seed))
    yield from model_stages(root, plan, seed, "none", f"{here}/start")
    for name, script, config in (
        ("captioner", "train_caption.py", "caption_finetune"),
        ("filter", "train_retrieval.py", "retrieval"),
    ):
        settings = tuning_settings(root, plan, name) | {"pretrained": root / here / "none" / "checkpoint_best.pth"}
        yield script_stage(root, f"{here}/tools/{name}", (f"{here}/none",), script, config, settings, seed)
    tools = {name: root / here / "tools" / name / "checkpoint_best.pth" for name in ("captioner", "filter")}
    for decoding, sample in DECODING.items():
        settings = {"pairs": [web_list(root)], "image_root": root / "world", "sample": sample, **tools}
        needs = (f"{here}/tools/captioner", f"{here}/tools/filter")
        yield script_stage(root, f"{here}/capfilt_{decoding}", needs, "capfilt.py", "capfilt", settings, seed)
    for name, pairs in SETS.items():
        if name != "none":
            yield from model_stages(root, plan, seed, name, f"{here}/capfilt_{pairs.decoding}")


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
    world = world_settings(root)
    captioning = {"prompt": "", "java": "false", "coco_gt_root": world["ann_root"]}
    for kind, script, config, more in (
        ("caption", "train_caption.py", "caption_finetune", captioning),
        ("retrieval", "train_retrieval.py", "retrieval", {"k_test": 32}),
    ):
        settings = world | more | {"pretrained": root / here / "checkpoint_best.pth"}
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


def world_settings(root: Path) -> dict:
    """Return the settings that name the folders of images and annotations."""
    return {"image_root": root / "world", "ann_root": root / "world" / "annotations"}


def tuning_settings(root: Path, plan: Plan, tool: str) -> dict:
    """Return the settings of fine-tuning on the human captions; only the validation images are evaluated."""
    annotations = root / "world" / "annotations"
    settings = world_settings(root) | {"max_epoch": plan.tuning, "eval_every": plan.tuning, "warmup": plan.warmup}
    settings |= {"init_lr": "3e-4", "train_file": annotations / "coco_karpathy_train.json"}
    if tool == "captioner":
        files = {"test_file": "coco_karpathy_val.json", "test_gt": "coco_karpathy_val_gt.json"}
        settings |= {"java": "false", "coco_gt_root": annotations}
    else:
        files = {"test_file": "flickr30k_val.json"}
    return settings | {key: annotations / name for key, name in files.items()}


# Files of the stages.


def web_list(root: Path) -> Path:
    """Return the list of the web pairs."""
    return root / "world" / "annotations" / "pretrain_web.json"


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
    human = read_json(root / "world" / "annotations" / "pretrain_human.json")
    if name == "none":
        return human + read_json(web_list(root))
    wanted, found = SETS[name], []
    folder = root / f"seed{seed}" / f"capfilt_{wanted.decoding}"
    for file in ("bootstrapped", "dropped"):
        rows = map(json.loads, (folder / f"{file}.jsonl").read_text().splitlines())
        found += [row for row in rows if wanted.takes(row["source"], file == "bootstrapped")]
    return human + [{"image": row["image"], "caption": row["caption"]} for row in found]


def write_pairs(path: Path, pairs: list[dict], count: int, seed: int) -> None:
    """Write `count` pairs: all of them in random order, repeated as often as needed."""
    rng = random.Random(f"pairs/{seed}")
    rounds = (rng.sample(pairs, len(pairs)) for _ in itertools.count())
    rows = itertools.islice(itertools.chain.from_iterable(rounds), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Running the stages.


class Runner:
    """Runs stages, several at a time; files in `done/` record the finished ones and their seconds.

    Args:
        root: folder of the experiment.
        jobs: number of stages at a time.
    """

    def __init__(self, root: Path, jobs: int):
        self.root, self.jobs, self.children = root, jobs, set[subprocess.Popen]()

    def mark(self, stage: Stage) -> Path:
        """Return the file that records a finished stage."""
        return self.root / "done" / f"{stage.name.replace('/', '.')}.json"

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages that are not done; every stage comes after those it needs.

        Raises:
            UserError: a stage failed; the running ones are ended.
        """
        began, futures = time.monotonic(), dict[str, Future]()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for stage in stages:
                    needed = [futures[name] for name in stage.needs]
                    futures[stage.name] = pool.submit(self.run_one, stage, needed)
                for number, future in enumerate(as_completed(futures.values()), 1):
                    minutes = (time.monotonic() - began) / 60
                    print(f"{number}/{len(stages)}  {future.result()}  ({minutes:.1f} minutes in all)", flush=True)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in self.children:
                    child.terminate()

    def run_one(self, stage: Stage, needed: Sequence[Future]) -> str:
        """Run a stage after those it needs, mark it as done, and return its name and seconds."""
        for future in needed:
            future.result()
        mark, began = self.mark(stage), time.monotonic()
        if not mark.is_file():
            if stage.before:
                stage.before()
            if stage.command:
                self.execute(stage)
            write_json(mark, {"seconds": time.monotonic() - began})
        return f"{stage.name}  {read_json(mark)['seconds']:.0f} s"

    def execute(self, stage: Stage) -> None:
        """Run a stage's command, or continue a stopped one; its output goes to <stage>.log.

        Raises:
            UserError: the command failed.
        """
        command, log = [sys.executable, *stage.command], self.root / "logs" / f"{stage.name.replace('/', '.')}.log"
        if (self.root / stage.name / "checkpoint_last.pth").is_file():
            command.append("--resume")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # each stage has one core
        with open(log, "w", encoding="utf-8") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.children.add(child)
            code = child.wait()
        self.children.discard(child)
        if code:
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"stage {stage.name} ended with {code}: {last}; see {log}, and start again to continue")


def keep_plan(root: Path, plan: Plan) -> None:
    """Write the plan to the folder.

    Raises:
        UserError: the folder holds stages of another plan.
    """
    path = root / "plan.json"
    if path.is_file() and read_json(path) != vars(plan):
        raise UserError(f"{root} holds stages of another plan ({path}); choose another --output, or delete it")
    write_json(path, vars(plan))


def main() -> int:
    """Run the stages that are not done, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/bootstrap", help="folder of everything (default: output/bootstrap)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="stages at once (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a few pairs and one seed, as a test")
    args = parser.parse_args()
    root, plan = Path(args.output), QUICK if args.quick else Plan()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        keep_plan(root, plan)
        Runner(root, max(args.jobs, 1)).run(all_stages(root, plan))
        print(write_tables(root, plan.seeds))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

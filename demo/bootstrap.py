"""The paper's tables 1 and 2 in miniature: what captioning and filtering web texts is worth (sections 4.2 and 4.3).

    python -m demo.bootstrap --output output/bootstrap

For every seed: pretrain on human and web pairs, fine-tune a captioner and a filter on the human ones, bootstrap the
web pairs, and pretrain anew on each set of pairs, always as long. A killed run goes on with the same command.
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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.bootstrap_table import SETS, write_tables
from launch.config import PretrainConfig, load_config
from models.blip_pretrain import blip_pretrain
from models.pretrained import load_pretrained
from utils import UserError

CONFIGS = "configs/miniature"
DECODING = {"nucleus": "true", "beam": "false"}  # capfilt.py's `sample`


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Args:
        seeds: runs of everything but the world.
        level: of the world.
        train: images with five human captions each.
        web: images with one web text each, of which 45% do not match.
        test: images that every model captions and ranks.
        rows: pairs of one pass of pretraining, whatever the set's size: repeated or left out at random.
        passes: of pretraining.
        tuning: passes of fine-tuning over the human pairs.
        warmup: steps.
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
    """One step of the experiment: a function, then a command, either of which may be absent.

    Args:
        name: also its folder's path from the root.
        needs: stages that come before.
        before: called first.
        command: arguments of Python.
    """

    name: str
    needs: tuple[str, ...] = ()
    before: Callable[[], None] | None = None
    command: list[str] = field(default_factory=list)


# The stages.


def all_stages(root: Path, plan: Plan) -> list[Stage]:
    """Return every stage, in an order in which they could run one by one."""
    counts = {"train": plan.train, "val": 8, "test": plan.test, "web": plan.web, "level": plan.level, "seed": 1}
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    world = Stage("world", command=["-m", "miniature", "--output", str(root / "world"), *options])
    return [world, *(stage for seed in range(plan.seeds) for stage in seed_stages(root, plan, seed))]


def seed_stages(root: Path, plan: Plan, seed: int) -> Iterator[Stage]:
    """Yield the stages of one seed: the tools, the bootstrapped pairs, and the models to compare."""
    here = f"seed{seed}"
    start = root / here / "start.safetensors"
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
    """Yield the pretraining on one set of pairs, and the evaluation of what came out, without fine-tuning."""
    here = f"seed{seed}/{name}"
    pairs = root / here / "pairs.jsonl"
    settings = {
        "image_root": root / "world",
        "train_file": [pairs],
        "pretrained": root / f"seed{seed}" / "start.safetensors",
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
    """Return where images and annotations are."""
    return {"image_root": root / "world", "ann_root": root / "world" / "annotations"}


def tuning_settings(root: Path, plan: Plan, tool: str) -> dict:
    """Return the settings of fine-tuning on the human captions; nothing but the validation images is evaluated."""
    annotations = root / "world" / "annotations"
    settings = world_settings(root) | {"max_epoch": plan.tuning, "eval_every": plan.tuning, "warmup": plan.warmup}
    settings |= {"init_lr": "3e-4", "train_file": annotations / "coco_karpathy_train.json"}
    if tool == "captioner":
        files = {"test_file": "coco_karpathy_val.json", "test_gt": "coco_karpathy_val_gt.json"}
        settings |= {"java": "false", "coco_gt_root": annotations}
    else:
        files = {"test_file": "flickr30k_val.json"}
    return settings | {key: annotations / name for key, name in files.items()}


# What the stages read and write.


def web_list(root: Path) -> Path:
    """Return the list of the web pairs."""
    return root / "world" / "annotations" / "pretrain_web.json"


def start_weights(path: Path, seed: int) -> None:
    """Write the weights that every pretraining of a seed starts from.

    As the paper's image encoder starts from ImageNet's, ours starts from the miniature model's, made on other
    images; the text transformer, which BERT's weights begin, here begins from random ones.
    """
    torch.manual_seed(seed)
    config = load_config(PretrainConfig, f"{CONFIGS}/pretrain.yaml")
    settings = config.model_settings() | {"embed_dim": config.embed_dim, "queue_size": config.queue_size}
    model = blip_pretrain(**settings)
    known = load_pretrained(blip_pretrain(**settings), f"{CONFIGS}/model.safetensors", "pretrain")
    for name in ("visual_encoder", "visual_encoder_m"):
        getattr(model, name).load_state_dict(known.visual_encoder.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(distinct(model.state_dict()), path)


def distinct(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict whose tensors share no memory, as safetensors wants it."""
    return {key: value.clone().contiguous() for key, value in state.items()}


def choose_pairs(root: Path, seed: int, name: str) -> list[dict]:
    """Return the pairs of one set: the human ones, and what the set takes of web and synthetic texts."""
    human = json.loads((root / "world" / "annotations" / "pretrain_human.json").read_text())
    if name == "none":
        return human + json.loads(web_list(root).read_text())
    wanted, found = SETS[name], []
    folder = root / f"seed{seed}" / f"capfilt_{wanted.decoding}"
    for file in ("bootstrapped", "dropped"):
        rows = map(json.loads, (folder / f"{file}.jsonl").read_text().splitlines())
        found += [row for row in rows if wanted.takes(row["source"], file == "bootstrapped")]
    return human + [{"image": row["image"], "caption": row["caption"]} for row in found]


def write_pairs(path: Path, pairs: list[dict], count: int, seed: int) -> None:
    """Write `count` pairs: all in a random order, as many times as it takes."""
    rng = random.Random(f"pairs/{seed}")
    rounds = (rng.sample(pairs, len(pairs)) for _ in itertools.count())
    rows = itertools.islice(itertools.chain.from_iterable(rounds), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Running them.


class Runner:
    """Runs stages, several at a time, each when what it needs is done; remembers on disk which are.

    Args:
        root: folder of everything; `done/` in it holds a file, with the seconds it took, for each finished stage.
        jobs: stages at once.
    """

    def __init__(self, root: Path, jobs: int):
        self.root, self.jobs, self.children = root, jobs, set[subprocess.Popen]()
        self.began = time.monotonic()

    def mark(self, stage: Stage) -> Path:
        """Return the file that tells that a stage is done."""
        return self.root / "done" / f"{stage.name.replace('/', '.')}.json"

    def run(self, stages: Sequence[Stage]) -> None:
        """Run what is not done yet.

        Raises:
            UserError: a stage failed; the others that were running are ended.
        """
        waiting = [stage for stage in stages if not self.mark(stage).is_file()]
        done = {stage.name for stage in stages} - {stage.name for stage in waiting}
        running: dict[Future, Stage] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    for stage in [s for s in waiting if done.issuperset(s.needs)][: self.jobs - len(running)]:
                        waiting.remove(stage)
                        running[pool.submit(self.run_one, stage)] = stage
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        stage = running.pop(future)
                        future.result()
                        done.add(stage.name)
                        self.tell(stage, len(done), len(stages))
            finally:
                for child in self.children:
                    child.terminate()

    def run_one(self, stage: Stage) -> None:
        """Run a stage to its end and mark it done."""
        began = time.monotonic()
        if stage.before:
            stage.before()
        if stage.command:
            self.execute(stage)
        mark = self.mark(stage)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"seconds": time.monotonic() - began}))

    def execute(self, stage: Stage) -> None:
        """Run a stage's command, going on where a killed one stopped; its output goes to <stage>.log.

        Raises:
            UserError: it failed.
        """
        command, log = [sys.executable, *stage.command], self.root / "logs" / f"{stage.name.replace('/', '.')}.log"
        if (self.root / stage.name / "checkpoint_last.pth").is_file():
            command.append("--resume")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=one_thread())
            self.children.add(child)
            code = child.wait()
        self.children.discard(child)
        if code:
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"stage {stage.name} ended with {code}: {last}; see {log}, and start again to go on")

    def tell(self, stage: Stage, done: int, total: int) -> None:
        """Print that a stage is done."""
        seconds = json.loads(self.mark(stage).read_text())["seconds"]
        minutes = (time.monotonic() - self.began) / 60
        print(f"{done}/{total}  {stage.name}  {seconds:.0f} s  ({minutes:.1f} minutes in all)", flush=True)


def one_thread() -> dict[str, str]:
    """Return the environment of a stage, which has one core to itself."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def keep_plan(root: Path, plan: Plan) -> None:
    """Note the plan in the folder, or refuse a folder of another.

    Raises:
        UserError: the folder's stages were made by another plan.
    """
    path, text = root / "plan.json", json.dumps(vars(plan))
    if path.is_file() and path.read_text() != text:
        raise UserError(f"{root} holds stages of another plan ({path}); choose another --output, or delete it")
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> int:
    """Read the command line, run what is not done, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/bootstrap", help="folder of everything (default: output/bootstrap)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="stages at once (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a few pairs and one seed: does it run?")
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
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
